"""Long-reasoning problems with exact checkers, and the model trained on them."""

from deltadecode.lab.tasks.chain import (
    Problem,
    extract_answer,
    first_wrong_line,
    is_correct,
    make_problem,
)
from deltadecode.lab.tasks.embedded import model_path

__all__ = [
    "Problem",
    "extract_answer",
    "first_wrong_line",
    "is_correct",
    "make_problem",
    "model_path",
]
