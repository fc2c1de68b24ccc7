"""Without lm-evaluation-harness, ``--lm-eval`` says what to install."""

import sys

import pytest

from deltadecode.errors import EvaluationError
from deltadecode.lab.evaluation.cells import Cell
from deltadecode.lab.evaluation.lm_eval import evaluate


def test_a_missing_harness_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"pip install 'deltadecode\[lm-eval\]'"):
        evaluate(None, None, Cell("full", 0), ["x"], include=None, limit=1, batch=1, seed=0)
