"""CLSA in vLLM: its caches, its layers, and what an engine for it is checked for (docs/clsa.md)."""
