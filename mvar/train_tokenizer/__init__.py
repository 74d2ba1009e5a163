"""Training of VAR's multi-scale residual VQ-VAE: `mvar train-tokenizer`, on the loop of :mod:`mvar.train`.

flags          command-line flags
run            a run from its flags to the saved tokenizer
trainer        the training: losses, optimizer steps, validation
objective      reconstruction losses
perceptual     LPIPS
discriminator  PatchGAN, hinge losses, adaptive weight
codebook       usage and entropy of the codes
"""
