"""What ships: it knows `quantjax.core` only, and learns of a method from the encoded leaf."""

from quantjax.encoded.packed import product

__all__ = ["product"]
