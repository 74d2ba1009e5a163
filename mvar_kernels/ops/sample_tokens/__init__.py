"""From logits to tokens: guidance, top-k, top-p and sampling."""
