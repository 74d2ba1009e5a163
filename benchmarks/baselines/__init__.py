"""What mvar is compared with: eager PyTorch, torch.compile and third-party kernels."""
