"""`python -m mvar <command>` and `torchrun … -m mvar <command>`: the same program as `mvar <command>`."""

from mvar.cli.main import main

if __name__ == "__main__":
    main()
