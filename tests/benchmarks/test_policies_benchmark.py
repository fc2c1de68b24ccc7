"""The comparison of policies: what runs, what is kept, and how it is shown."""

import json
import shutil
import time
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.command import launch
from benchmarks.policies import cases, figure, tables
from benchmarks.policies.__main__ import policies
from benchmarks.policies.report import make_result
from benchmarks.policies.run import Comparison
from deltadecode.config import DeltaConfig
from deltadecode.lab.policies import make_policy

WORDS = ["the", "of", "code", "is", "VAR", "=", "text", "rain", "boats", "river", "was", "in"]
CONTEXT = 250
PLAN = DeltaConfig(
    page_size=16, budget_pages=4, recent_pages=1, dense_layers=(0,), delta_layers=(1, 3)
)
SHORT = "text:stdlib-docs:context={context}:tokens=8"


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<unk>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=24,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            initializer_range=0.4, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip


def comparison(model, tokenizer, folder, **changes):
    return Comparison(
        lambda dtype: model, tokenizer, folder,
        **{"budget": 176, "plan": PLAN, "samples": 2, "pieces": 2, "contexts": [CONTEXT],
           "tasks": ["needle", "docs"], **changes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cases.TASKS, "docs", SHORT)
        assert comparison(model, tokenizer, folder).run(lambda text, share: said.append(text))
    assert not [text for text in said if "left out" in text]
    return folder


def test_every_policy_runs_on_every_task(finished, tmp_path):
    result = make_result(finished, "a command")
    assert json.loads(json.dumps(result)) == result
    names = list(json.loads((finished / "names.json").read_text()).values())
    assert names[:3] == ["full attention", "DELTA, default plan", "DELTA, calibrated plan"]
    assert len(names) == 21 and result["unfinished"] == []
    assert [(r["task"], r["policy"]) for r in result["rows"]] == [
        (task, name) for task in ("needle", "docs") for name in names
    ]
    for row in result["rows"]:
        assert len(row.get("kls", row.get("scores"))) == 2
        assert row["dtype"] == "float32" and str(finished) not in json.dumps(row)
        assert ("kl" in row) == (row["task"] == "docs")
    assert set(result["kascade"]) == {"kascade-5", f"kascade-{len(_anchors(result))}"}
    reads = {r["policy"]: r["attended_fraction"] for r in result["rows"] if r["task"] == "docs"}
    equal = ["LessIsMore, DELTA's layers", "TidalDecode, DELTA's layers"]
    for name in equal:
        assert reads[name] == pytest.approx(reads["DELTA, default plan"], abs=0.02)
    figure.draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def _anchors(result):
    return max((fit["anchors"] for fit in result["kascade"].values()), key=len)


def test_the_table_has_a_line_for_each_policy_and_fills_a_page(finished, tmp_path):
    result = make_result(finished, "a command")
    titles, lines = tables.cells(result)
    assert titles == [
        "policy", "read at 250", "needle, %", "− full at 250 [95 %]", "docs, KL",
        "perplexity ÷ full at 250",
    ]  # fmt: skip
    assert lines[0] == ["full attention", "100 %", "0", "–", "0.000", "1.000"]
    assert len(lines) == 21 and all(len(line) == 6 for line in lines)
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- eval:policies -->\nold\n<!-- /eval:policies -->\nb\n")
    tables.fill(page, result, tmp_path / "r.json", tmp_path / "r.png")
    text = page.read_text()
    assert "| KeyDiff |" in text and "![r](r.png)" in text and "old" not in text


def test_samples_of_several_commits_are_all_named(finished, tmp_path):
    folder = tmp_path / "samples"
    shutil.copytree(finished, folder)
    assert "commits" not in make_result(folder, "a command")
    path = next(folder.glob("*.jsonl"))
    header, *samples = path.read_text().splitlines()
    header = json.loads(header)
    header["made_by"]["commit"] = "another"
    path.write_text("\n".join([json.dumps(header), *samples]) + "\n")
    assert "another" in make_result(folder, "a command")["commits"]


def test_a_stopped_run_goes_on_and_says_what_is_missing(model, tokenizer, tmp_path):
    names = ["full", "KeyDiff"]
    run = partial(comparison, model, tokenizer, tmp_path, wanted=names, tasks=["needle"], batch=1)
    assert not run(deadline=time.monotonic()).run(lambda text, share: None)
    assert run().run(lambda text, share: None)
    kept = {path.name: path.read_text() for path in tmp_path.glob("needle*")}
    assert run().run(lambda text, share: None)
    assert kept == {path.name: path.read_text() for path in tmp_path.glob("needle*")}
    (broken,) = tmp_path.glob("*keydiff*")
    broken.write_text("".join(broken.read_text().splitlines(keepends=True)[:-1]))
    result = make_result(tmp_path, "a command")
    assert result["unfinished"] == ["needle at 250, keydiff"]
    assert [row["policy"] for row in result["rows"]] == ["full attention"]


def test_shards_share_the_policies_out(model, tokenizer, tmp_path):
    parts = [
        [entry.name for entry in comparison(model, tokenizer, tmp_path, shard=(n, 3)).entries]
        for n in range(3)
    ]
    everything = comparison(model, tokenizer, tmp_path).entries
    shared_out = sorted(name for part in parts for name in part)
    assert shared_out == sorted(entry.name for entry in everything)


def test_kascade_gets_as_many_anchors_as_move_no_more_than_delta(model):
    count = cases.equal_anchors(model, 176, length=2000)

    def moved(spec):
        policy, lengths = make_policy(spec, model, 176), np.array([2000.0])
        return policy.expected(lengths, 0) + policy.overhead(lengths)

    assert moved(f"kascade:anchors={count}") <= moved("delta")
    assert moved(f"kascade:anchors={count + 1}") > moved("delta")


def test_a_plan_keeps_its_own_fields(model):
    policy = make_policy(cases.plan_spec(PLAN), model, 64)
    assert policy.cfg == PLAN


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "chess"], "--task must be one of needle, multi-key"),
        (["--shard", "3/3"], "--shard must be I/N with I < N"),
        (["--docs", "page.md"], "--docs needs --report and --out"),
        (["--report", "--samples", "nowhere"], "holds no comparison of policies"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(outcome, arguments, words):
    code, out, err = outcome(partial(launch, policies), *arguments)
    assert (code, out) == (2, "") and words in err.replace("\n", " ")
