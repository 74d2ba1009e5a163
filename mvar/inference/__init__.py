"""Image generation: sampling scale by scale, on copies of the modules for inference."""
