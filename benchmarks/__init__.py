"""Measurements; their figures are in docs/benchmarks.md."""
