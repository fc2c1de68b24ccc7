"""Many requests, a third of them aborted: ``python -m benchmarks.soak``."""
