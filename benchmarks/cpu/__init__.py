"""Decode steps on the CPU, and their memory: ``python -m benchmarks.cpu``."""
