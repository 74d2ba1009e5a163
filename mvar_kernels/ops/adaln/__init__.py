"""Adaptive layer norm, alone and fused with the gated residual before it."""
