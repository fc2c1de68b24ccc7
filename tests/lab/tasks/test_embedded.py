"""The shipped model: loads with stock Transformers, solves problems, small enough to ship."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltadecode as dd
from deltadecode.lab.tasks import is_correct, make_problem, model_path
from deltadecode.lab.tasks.vocabulary import encode


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)


def test_the_model_is_a_standard_small_llama(model):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.num_hidden_layers >= 24
    assert model.config.head_dim == 64
    assert sum(file.stat().st_size for file in model_path().iterdir()) <= 30e6


def test_tokenizer_and_vocabulary_agree_and_text_survives(tokenizer):
    problem = make_problem(11)
    text = problem.prompt + problem.solution
    ids = tokenizer(text).input_ids
    assert ids == encode(text)
    assert tokenizer.decode(ids) == text


def solve(model, tokenizer, problems):
    inputs = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=420, do_sample=False)
    new = out[:, inputs.input_ids.shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def test_full_attention_and_delta_solve_short_problems(model, tokenizer):
    """Unequal prompts in one left-padded batch; the long problems are measured, not tested."""
    problems = [make_problem(100 + i, steps=12 + 3 * i, distractors=30 + 7 * i) for i in range(3)]
    full = solve(model, tokenizer, problems)
    assert all(is_correct(p, t) for p, t in zip(problems, full, strict=True))
    dd.enable(model)
    assert solve(model, tokenizer, problems) == full
    assert dd.stats(model).attended_fraction < 0.9


def test_the_embedded_model_has_its_own_plan(model):
    plan = dd.DeltaConfig.for_model(model).layer_plan(24)
    assert [plan.role(i) for i in range(24)].count("sparse") == 20
