"""Adaptive loss-aware quantization: sums of binary bases, trained on the loss."""
