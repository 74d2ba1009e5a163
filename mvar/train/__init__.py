"""Training: `mvar train`, `torchrun -m mvar train`, with the flags of VAR's and M-VAR's trainers.

run_flags         flags of all training commands, and their parser
flags             flags and presets of `mvar train`
validate          checks before anything is read, built or written
run               a run from its flags to the saved model
process           process group and torch's settings of a run
loop              the loop: steps, logging, checkpoints, signals
trainer           the training of a model
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
