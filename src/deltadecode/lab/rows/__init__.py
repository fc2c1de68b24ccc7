"""Many rows of one text in one forward pass, each as if it were decoded alone."""

from deltadecode.lab.rows.text import RowLosses, RowsText, refusal

__all__ = ["RowLosses", "RowsText", "refusal"]
