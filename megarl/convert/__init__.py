"""`megarl convert`: Hugging Face directories to and from Megatron's distributed checkpoints."""
