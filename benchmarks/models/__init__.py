"""Models that benchmarks and tests run over."""
