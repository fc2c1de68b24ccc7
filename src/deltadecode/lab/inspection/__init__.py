"""What a model's attention does: attention sinks, and how well pages of one layer serve another.

``deltadecode inspect`` is its command line; docs/inspection.md says how to read the report.
"""
