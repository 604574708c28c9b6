"""Semi-relaxed quantization, its parent RQ, and DropBits."""
