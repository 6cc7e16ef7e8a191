"""Benchmarks: what things cost, measured by whoever runs them."""
