"""Architectures of our own, as Transformers classes; each has a page in docs."""
