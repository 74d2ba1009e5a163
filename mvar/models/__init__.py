"""M-VAR, VAR and the tokenizer: configurations, layers, weights."""
