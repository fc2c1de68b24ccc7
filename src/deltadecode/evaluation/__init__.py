"""Accuracy under sparse decoding: policies, budgets and tasks, sample by sample.

``deltadecode eval`` and ``python -m deltadecode.evaluation`` are its command line; docs/accuracy.md
says what is measured and how.
"""
