"""What every method stands on: the interface, encoded leaves, paths and rounding."""
