"""Training: the engine, phases, and what is shown meanwhile."""
