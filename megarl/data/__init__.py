"""Prompts, demonstrations and the tokenizer: everything that is read before the first step."""
