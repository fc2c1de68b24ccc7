"""Accuracy under sparse decoding: policies, budgets and tasks, sample by sample.

``deltadecode eval`` is its command line; docs/accuracy.md says what is measured and how.
"""
