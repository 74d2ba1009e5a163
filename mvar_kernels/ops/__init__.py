"""One room per family of ops: maths and public functions, reference, kernels, cases."""
