"""What every training run has around its steps: directory, sinks, checkpoints, resume, signals."""
