"""The methods of bench_generation.py, the configurations it measures, and the check of each method's output."""
