"""Compiles what the package launches, for GPUs that need not be there: ``python -m benchmarks.offline``."""
