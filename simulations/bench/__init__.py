"""Benchmarks and drills: what things cost, and what survives, measured by whoever runs them."""
