"""Training of VAR's multi-scale residual VQ-VAE, the tokenizer of :mod:`mvar.models.tokenizer`."""
