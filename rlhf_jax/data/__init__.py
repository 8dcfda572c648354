"""Text to NumPy batches, on the host: sources, tokenizer, prompts, batches."""
