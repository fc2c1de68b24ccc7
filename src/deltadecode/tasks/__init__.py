"""Long-reasoning problems with exact checkers, and the model trained on them."""

from deltadecode.tasks.chain import (
    Problem,
    extract_answer,
    first_wrong_line,
    is_correct,
    make_problem,
)
from deltadecode.tasks.embedded import model_path

__all__ = [
    "Problem",
    "extract_answer",
    "first_wrong_line",
    "is_correct",
    "make_problem",
    "model_path",
]
