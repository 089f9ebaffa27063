"""The hot kernels in Gluon, with explicit layouts: a warp owns whole rows; see ops/README.md.  For NVIDIA GPUs."""
