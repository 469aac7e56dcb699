"""Datasets and tokenizer: prompts, demonstrations and preference pairs."""
