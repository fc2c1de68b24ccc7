"""Speed of the evaluation itself: ``python -m benchmarks.evaluation``."""
