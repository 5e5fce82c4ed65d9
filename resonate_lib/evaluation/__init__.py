"""Measuring a generator: statistics with intervals, metrics, the benchmark, and the independent judge."""
