"""Checkpoints between Hugging Face directories and Megatron's distributed format, both ways."""
