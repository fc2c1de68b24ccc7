"""Whole vLLM engines: ``python -m benchmarks.e2e``."""
