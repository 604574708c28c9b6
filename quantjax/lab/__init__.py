"""Data, models, the training engine, reports and the command line."""
