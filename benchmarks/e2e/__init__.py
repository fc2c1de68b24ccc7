"""A benchmark of the project; not in the wheel."""
