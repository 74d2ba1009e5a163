"""What the tests, `mvar check` and the benchmarks share: an op's cases, inputs and tolerance."""
