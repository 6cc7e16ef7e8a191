"""Benchmarks and drills: long measurements that a person starts."""
