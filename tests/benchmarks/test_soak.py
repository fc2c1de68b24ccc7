"""The soak: what is compared, and what must hold after it, with engines that make mistakes."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.command import launch
from benchmarks.soak.__main__ import soak as command
from benchmarks.soak.report import table
from benchmarks.soak.run import SoakOptions, first_difference, growth, random_prompts, soak
from deltadecode.lab.tasks import model_path

FAKE = str(Path(__file__).with_name("fake_soak.py"))
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def options(*mistakes, **given):
    return SoakOptions(
        model=Path("m"), layers=6, worker=(sys.executable, FAKE, *mistakes),
        **{"requests": 40, "tokens": 6, **given},
    )  # fmt: skip


def test_nothing_is_wrong_with_an_engine_without_mistakes():
    result = soak(options(), PROMPTS)
    (row,) = result["rows"]
    assert result["failures"] == [] and row["wrong"] == 0
    assert row["started"] == 40 == row["finished"] + row["aborted"]
    assert row["free_blocks"] == row["free_blocks_at_start"] == 9
    assert len(row["memory"]) == 21 and row["growth"] is None
    assert table(result).row_count == 7


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("leak", "2 blocks of the cache leaked"),
        ("lose", "1 requests never ended"),
        ("token", "1 of 20 answers have a wrong token"),
        ("short", "1 of 20 answers have a wrong token"),
    ],
)
def test_each_mistake_is_found(mistake, said):
    assert soak(options(mistake), PROMPTS)["failures"] == [said]


def test_memory_that_grows_is_found():
    result = soak(options("grow", requests=1000), PROMPTS)
    assert [failure.partition(" by ")[0] for failure in result["failures"]] == ["memory grew"]
    assert soak(options(requests=1000), PROMPTS)["rows"][0]["growth"] == 0.0


def test_a_near_tie_may_turn():
    (row,) = soak(options("token", tolerance=0.5), PROMPTS)["rows"]
    assert (row["wrong"], row["near_ties"]) == (0, 1)
    assert 1e-4 < row["most_lost"] <= 0.5


def test_the_first_other_token_is_found():
    answer = {"tokens": [5, 6, 7, 8]}
    for tokens, asked, place in (
        ([5, 6], 2, None), ([5, 6, 7, 8], 9, None), ([5, 9], 2, 1), ([5], 2, 1),
        ([5, 6, 7, 8, 1], 9, 4), ([9, 6], 2, 0),
    ):  # fmt: skip
        assert first_difference({"tokens": tokens, "asked": asked}, answer) == place


def test_growth_is_that_after_the_start():
    assert growth([1, 50, 80, 90, 100, 100, 110, 110], 1000) == 0.1
    assert growth([1, 50, 80, 90, 100, 100, 110, 110], 999) is None


def test_the_plan_reads_every_page():
    for longest in (1, 8, 200):
        plan = options().plan(longest)
        pages = -(-longest // plan.page_size)
        assert plan.pages_for(pages) >= pages
        plan.layer_plan(6)


def test_prompts_are_the_models_own_and_of_many_lengths():
    prompts = random_prompts(20, 60, seed=3)
    assert prompts == random_prompts(20, 60, seed=3)
    assert {len(prompt) for prompt in prompts} <= set(range(38, 61))
    assert len({len(prompt) for prompt in prompts}) > 5


def test_the_model_is_sure_of_what_follows_a_prompt():
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.bfloat16)
    for prompt in random_prompts(4, 120, seed=5):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        first, second = torch.cat(out.logits).float().log_softmax(-1).topk(2).values.unbind(-1)
        assert (first - second).min() > 5  # nats; rounding moves a logit by tenths


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dtype", "int8"], "'int8'"),
        (["--blocks", "2"], "--blocks"),
        (["--input-len", "37"], "--input-len"),
        (["--minutes", "0"], "--minutes"),
        (["--memory-share", "-1"], "--memory-share"),
        (["--tag", "a/b"], "'a/b'"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(outcome, arguments, named):
    code, out, err = outcome(partial(launch, command), *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize(("mistakes", "ended"), [((), 0), (("leak",), 1)])
def test_the_exit_code_says_whether_all_held(outcome, monkeypatch, mistakes, ended):
    monkeypatch.setattr("benchmarks.e2e.run.has_vllm", lambda: True)
    monkeypatch.setattr("benchmarks.soak.run.make_options", lambda **given: options(*mistakes))
    code, out, err = outcome(partial(launch, command), "--json", "--prompts", "3")
    assert code == ended
    assert json.loads(out)["benchmark"] == "soak"
    assert ("leaked" in err) == bool(ended)


@pytest.mark.parametrize(("eager", "blocks", "fixed"), [(0, 9, True), (0, None, 0), (1, 9, 0)])
def test_a_cache_of_so_many_blocks_is_not_measured_on_a_gpu(eager, blocks, fixed):
    given = options(eager=bool(eager), blocks=blocks)
    stock, delta = (given.spec(16, side) for side in (False, True))
    assert (stock["blocks"], delta["blocks"]) == (None, blocks)
    assert (stock["kv_bytes"] is not None) == (delta["kv_bytes"] is not None) == bool(fixed)
