"""Focused quantization: powers of two around the modes of a pruned distribution."""
