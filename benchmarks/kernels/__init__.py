"""Decode attention on a GPU: ``python -m benchmarks.kernels``."""
