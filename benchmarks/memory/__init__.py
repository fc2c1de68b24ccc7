"""Room and step time of KV caches on one GPU: ``python -m benchmarks.memory``."""
