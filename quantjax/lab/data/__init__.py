"""Data sets in memory, and what a training loop does to a batch."""

from quantjax.lab.data.images import (
    Dataset,
    Split,
    augment,
    epoch_indices,
    holdout,
    load,
    normalize,
)

__all__ = ["Dataset", "Split", "augment", "epoch_indices", "holdout", "load", "normalize"]
