"""The tables and plots of docs/generated, from the result files alone: `python -m benchmarks.report`."""
