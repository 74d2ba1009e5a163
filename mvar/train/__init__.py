"""Training: `mvar train`, `torchrun -m mvar train`, with the flags of VAR's and M-VAR's trainers.

flags             command-line flags and presets
validate          checks before anything is read, built or written
run               a run from its flags to the saved model
trainer           the loop
objective         the loss
optimizer         AdamW, clipping, loss scaling, skipped steps
schedule          learning rate, weight decay and scales by iteration
distributed       DDP, FSDP2, activation checkpointing
checkpoint        saving and resuming
metrics           log.jsonl and the terminal
tensorboard       event files
lock              one process per folder
digits_tokenizer  the tokenizer of --preset=digits
"""
