"""Training: `mvar train`, `torchrun -m mvar train`, under the flags of VAR's and M-VAR's trainers.

flags       what can be asked for, and presets
checks      what is refused before anything is read, built or written
lock        one run a folder
schedule    what follows from the number of an iteration: rates, scales in training
objective   the loss, and the model up to it
optimizer   AdamW, clipping, loss scaling, steps that are skipped
distributed processes: DDP, FSDP2
checkpoint  a run on disk
metrics     what is told about a run
tensorboard under which names there
trainer     the loop
"""
