"""`mvar check`: the kernels on this machine, held to their contract."""
