"""Timing, result files, memory, time limits and child processes, for every benchmark."""
