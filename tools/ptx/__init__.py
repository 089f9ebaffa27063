"""Executes the PTX of Triton kernels on the CPU and checks every access; see README.md."""
