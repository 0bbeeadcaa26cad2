"""Triton kernels of the one-dimensional convolutions; import them only where a GPU is used."""
