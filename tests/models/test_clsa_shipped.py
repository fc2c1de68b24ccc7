"""The CLSA model that deltadecode ships: small, trained, and used like any other."""

import sys
from pathlib import Path

import pytest
import torch
from needle_prompts import needles
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltadecode.cli import loading
from deltadecode.errors import DeltaDecodeError
from deltadecode.lab.tasks.chain import make_problem
from deltadecode.models import shipped
from deltadecode.models.clsa import ClsaForCausalLM

pytest.importorskip("deltadecode_clsa")
SEED = 20261129  # of no training


@pytest.fixture(scope="module")
def folder():
    return shipped.model_path()


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def answers(model, tokenizer, prompts, new_tokens, **options):
    """What it writes behind each prompt, all of them in one padded batch."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, **options)
    new = out[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def test_it_is_sparse_and_below_30_mb(folder, model):
    assert isinstance(model, ClsaForCausalLM)
    assert (model.config.mode, model.config.index_topk) == ("clsa", 256)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 30e6


@pytest.mark.parametrize("facts", [12, 90])
def test_it_finds_needles_in_more_tokens_than_it_reads(model, tokenizer, facts):
    asked, codes = zip(*needles(SEED, 8, facts), strict=True)
    length = len(tokenizer(asked[0])["input_ids"])
    assert (length > 3 * model.config.index_topk) == (facts == 90)
    got = answers(model, tokenizer, list(asked), 10)
    assert sum(one == code for one, code in zip(got, codes, strict=True)) >= 7


def test_steps_of_fixed_shapes_write_the_same(model, tokenizer):
    asked = [prompt for prompt, _ in needles(SEED, 3, 30)]
    plain = answers(model, tokenizer, asked, 10)
    assert answers(model, tokenizer, asked, 10, cache_implementation="static") == plain


def test_it_solves_short_chain_problems(model, tokenizer):
    problems = [make_problem(SEED + number, 3, 2) for number in range(8)]
    longest = max(len(tokenizer(one.solution)["input_ids"]) for one in problems)
    got = answers(model, tokenizer, [one.prompt for one in problems], longest + 2)
    right = [one == problem.solution.strip() for one, problem in zip(got, problems, strict=True)]
    assert sum(right) >= 6


def test_the_command_line_knows_its_name(folder, monkeypatch):
    assert Path(loading.resolve_model("clsa")) == folder
    monkeypatch.setitem(sys.modules, "deltadecode_clsa", None)
    with pytest.raises(DeltaDecodeError, match=r"deltadecode\[clsa\]"):
        shipped.model_path()
