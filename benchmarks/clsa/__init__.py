"""CLSA beside YOCO and a Transformer of one size: ``python -m benchmarks.clsa``."""
