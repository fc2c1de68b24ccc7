"""DELTA and its peers on a real model: ``python -m benchmarks.policies``."""
