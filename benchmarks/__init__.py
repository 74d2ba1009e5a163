"""Benchmarks: answers are checked before they are timed, and results are files that docs/generated is made from."""
