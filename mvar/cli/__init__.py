"""The `mvar` command: `main.py` parses the command line; each command is a module."""
