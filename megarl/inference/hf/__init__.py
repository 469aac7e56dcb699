"""Generation with Hugging Face's own models: any AutoModelForCausalLM, decoded in continuous batches."""
