"""One file per method; each knows `quantjax.core` only."""
