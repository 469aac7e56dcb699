"""A training run around its steps: directory, sinks, checkpoints, resume, signals."""
