"""The kernels in Triton, one file per stage, and the operators that torch knows them by; see README.md beside it.

Imported only where Triton is installed and asked for.
"""
