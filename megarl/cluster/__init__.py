"""The processes around the trainer: Ray here, launchers later."""
