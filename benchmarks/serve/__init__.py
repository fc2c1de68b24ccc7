"""Real vLLM servers under load: ``python -m benchmarks.serve``."""
