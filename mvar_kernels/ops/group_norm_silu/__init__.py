"""GroupNorm followed by SiLU, for the image tokenizer."""
