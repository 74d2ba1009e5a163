"""`mvar check`: accuracy of the kernels on this machine."""
