"""Benchmarks: each suite is a command, ``python -m benchmarks.<suite>``, built on :mod:`benchmarks.harness`."""
