"""One folder per family of ops: formulas and public functions, reference, kernels, cases."""
