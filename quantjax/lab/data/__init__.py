"""Data sets in memory, and what a training loop does to a batch."""

from quantjax.lab.data.images import augment, load, normalize
from quantjax.lab.data.prepared import prepared
from quantjax.lab.data.splits import ARRAYS, Dataset, Split, holdout, limited
from quantjax.lab.data.text import Text, Windows

__all__ = [
    "ARRAYS",
    "Dataset",
    "Split",
    "Text",
    "Windows",
    "augment",
    "holdout",
    "limited",
    "load",
    "normalize",
    "prepared",
]
