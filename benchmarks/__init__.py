"""Benchmarks: answers are checked before they are timed, and results are files that the README is made from."""
