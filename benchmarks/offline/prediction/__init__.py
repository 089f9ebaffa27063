"""How long a kernel would take on a GPU that is not there, and why: a model of its machine code; see README.md.

Nothing in here is a measurement.
"""
