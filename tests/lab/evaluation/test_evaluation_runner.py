"""Running: batches, kills, forced continuations, and what a record says."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from deltadecode.errors import EvaluationError
from deltadecode.lab.evaluation import losses
from deltadecode.lab.evaluation.cells import Cell
from deltadecode.lab.evaluation.records import Records
from deltadecode.lab.evaluation.runner import Evaluation, fingerprint
from deltadecode.lab.generation import first_difference
from deltadecode.lab.tasks import make_problem, model_path
from deltadecode.lab.tasks.registry import make_task

SMALL = "chain:steps=3:distractors=2"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


def quiet(*told):
    pass


def evaluation(model, tokenizer, task=SMALL, **options):
    values = {"samples": 4, "seed": 7, "batch": 4, **options}
    return Evaluation(model, tokenizer, make_task(task), **values)


def lines(folder):
    """All records of a folder by cell and seed, whatever their order in the files."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        records = Records.read(path)
        found[path.name] = {seed: records.samples[seed] for seed in sorted(records.samples)}
    return found


CELLS = [Cell("full", 0), Cell("h2o", 24), Cell("delta:recent_pages=1", 24), Cell("quest", 24)]


def test_a_record_says_what_happened(model, tokenizer, tmp_path):
    run = evaluation(model, tokenizer, keep_outputs=True)
    full, h2o, delta, _ = run.run(CELLS, tmp_path, quiet)
    for seed in range(7, 11):
        problem, record = make_problem(seed, 3, 2), full.samples[seed]
        assert record["text"].strip() == problem.solution.strip()
        assert (record["score"], record["answer"]) == (1.0, problem.answer)
        assert record["first_wrong"] is None and record["ended"]
        prompt, new = record["prompt"], record["tokens"]
        assert prompt == len(tokenizer(problem.prompt).input_ids)
        assert new == len(tokenizer(problem.solution).input_ids) + 1
        # Each new token but the last is read from by the steps after it, itself included.
        assert record["full"] == sum(range(prompt + 1, prompt + new)) == record["read"]
        assert record["kept"] == prompt + new - 1
        assert h2o.samples[seed]["kept"] == 24
        assert h2o.samples[seed]["read"] == 24 * (h2o.samples[seed]["tokens"] - 1)
        assert 0.1 < delta.samples[seed]["read"] / delta.samples[seed]["full"] < 0.6
    assert any(record["first_wrong"] is not None for record in h2o.samples.values())
    assert any(record["score"] < 1 for record in h2o.samples.values())


def test_batches_give_what_single_samples_give(model, tokenizer, tmp_path):
    task = "chain:steps=2:distractors=1"
    for batch, name in ((3, "three"), (1, "one")):
        run = evaluation(model, tokenizer, task, samples=3, batch=batch)
        run.run(CELLS[1:3], tmp_path / name, quiet)
    assert lines(tmp_path / "three") == lines(tmp_path / "one")


class Killed(Exception):
    pass


def test_a_killed_run_continues(model, tokenizer, tmp_path):
    told = []

    def kill(label, done, left):
        told.append((label, done))
        if label == "h2o 24: 3 of 3" and done > 0.84:
            raise Killed

    cells, options = CELLS[:2], {"samples": 3, "batch": 2}
    with pytest.raises(Killed):
        evaluation(model, tokenizer, **options).run(cells, tmp_path / "killed", kill)
    assert [len(found) for found in lines(tmp_path / "killed").values()] == [3, 2]
    assert [done for _, done in told] == sorted(done for _, done in told)
    told.clear()
    record = []
    evaluation(model, tokenizer, **options).run(
        cells, tmp_path / "killed", lambda label, done, left: record.append(label)
    )
    assert set(record) == {"h2o 24: 1 of 1"}
    evaluation(model, tokenizer, **options).run(cells, tmp_path / "whole", quiet)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_nothing_runs_beside_a_foreign_file(model, tokenizer, tmp_path):
    run = evaluation(model, tokenizer, samples=1)
    foreign = run.path(CELLS[1], tmp_path)
    Records.open(foreign, {**run.settings(CELLS[1]), "seed": 8}, {})
    with pytest.raises(EvaluationError, match="its seed is 8, not 7"):
        run.run(CELLS, tmp_path, lambda *told: pytest.fail("it ran"))


@pytest.fixture(scope="module")
def random_model(tokenizer):
    """A model that is sure of nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_perplexity_is_that_of_the_full_continuation(random_model, tokenizer, tmp_path):
    """Of any model, without answers: along what full attention writes, step by step."""
    run = evaluation(random_model, tokenizer, "perplexity:tokens=12:length=80", samples=2)
    full, streaming = run.run([Cell("full", 0), Cell("streaming", 12)], tmp_path, quiet)
    for each in run.encoded:
        prompt = torch.tensor([each.prompt])
        out = random_model.generate(prompt, max_new_tokens=12, do_sample=False)
        with torch.no_grad():
            logits = random_model(out).logits[0].double().log_softmax(dim=1)
        count, width = prompt.shape[1], out.shape[1]
        assert width == count + 12
        # The first new token comes from prefill, and is left out.
        slow = [-float(logits[t - 1, out[0, t]]) for t in range(count + 1, width)]
        found, other = (records.samples[each.sample.seed] for records in (full, streaming))
        assert found["nll"] == pytest.approx(sum(slow) / 11, rel=1e-4)
        assert found["nll"] != pytest.approx(slow[0], rel=1e-2)
        assert (found["score"], found["first_wrong"], found["tokens"]) == (1.0, None, 12)
        assert other["nll"] != pytest.approx(found["nll"], rel=1e-2)
        assert other["score"] < 1 and other["first_wrong"] >= 1
        assert other["read"] == 12 * 11


def test_the_loss_of_a_text_is_its_own(random_model, tokenizer, tmp_path, monkeypatch):
    """At once where the policy can, step by step where not, with the same numbers."""
    task = "text:stdlib-docs:context=60:tokens=9"
    delta = "delta:page_size=4:recent_pages=1:dense_layers=0+:delta_layers=1+"
    cells = [Cell("full", 0), *(Cell(policy, 12) for policy in ("streaming", "h2o", delta))]
    run = evaluation(random_model, tokenizer, task, samples=2)
    told = []
    at_once = run.run(cells, tmp_path / "once", lambda label, done, left: told.append(done))
    assert told == sorted(told) and told[-1] == pytest.approx(1.0)
    assert [records.samples[7]["at_once"] for records in at_once] == [True, True, False, True]
    for each in run.encoded:
        ids = torch.tensor([each.prompt + each.reference])
        assert ids.shape == (1, 70)
        with torch.no_grad():
            logits = random_model(ids).logits[0].double().log_softmax(dim=1)
        slow = [-float(logits[t - 1, ids[0, t]]) for t in range(61, 70)]
        full, *others = (records.samples[each.sample.seed] for records in at_once)
        assert full["nll"] == full["nll_full"] == pytest.approx(sum(slow) / 9, rel=1e-4)
        assert (full["score"], full["kl"], full["tokens"], full["prompt"]) == (1.0, 0.0, 9, 60)
        for other in others:
            assert other["kl"] > 1e-3 and other["nll_full"] == full["nll_full"]
            assert other["read"] < full["read"] == full["full"] == sum(range(61, 70))
    monkeypatch.setattr(losses, "refusal", lambda *given: "no")
    stepwise = run.run(cells, tmp_path / "steps", quiet)
    for ours, theirs in zip(at_once, stepwise, strict=True):
        for seed, record in ours.samples.items():
            expected = {**theirs.samples[seed], "at_once": record["at_once"]}
            assert record == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert not theirs.samples[seed]["at_once"]


def test_a_killed_run_of_a_text_goes_on(random_model, tokenizer, tmp_path):
    cells = [Cell("full", 0), Cell("streaming", 12)]
    task = "text:stdlib-docs:context=60:tokens=9"
    evaluation(random_model, tokenizer, task, samples=1).run(cells[:1], tmp_path, quiet)
    run = evaluation(random_model, tokenizer, task, samples=2)
    assert [len(r.samples) for r in run.run(cells, tmp_path, quiet)] == [2, 2]
    run.run(cells, tmp_path, lambda *told: pytest.fail("it ran"))


def test_what_the_model_cannot_hold_is_refused(model, tokenizer):
    with pytest.raises(EvaluationError, match="and the model has 8192 positions"):
        evaluation(model, tokenizer, "needle:length=9000", samples=1)
    with pytest.raises(EvaluationError, match="--chat needs a tokenizer with a chat template"):
        evaluation(model, tokenizer, chat=True)
    for task, message in [
        ("text:stdlib-docs:context=8190:tokens=9", "needs 8199 tokens .* 8192 positions"),
        ("text:stdlib-docs:context=99000000", "tokens, and context \\+ tokens \\+ 1 are 99000129"),
    ]:
        with pytest.raises(EvaluationError, match=message):
            evaluation(model, tokenizer, task, samples=1)
    with pytest.raises(EvaluationError, match="--chat is for prompts"):
        evaluation(model, tokenizer, "text:stdlib-docs", chat=True)


def test_a_fingerprint_tells_models_apart(model, tokenizer):
    again = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    assert fingerprint(again) == fingerprint(model)
    with torch.no_grad():
        again.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    assert fingerprint(again) != fingerprint(model)


def test_headers_say_how_they_were_made(model, tokenizer, tmp_path):
    run = evaluation(model, tokenizer, samples=1, made_by={"commit": "abc"})
    (found,) = run.run([Cell("streaming", 8, fraction=0.1)], tmp_path, quiet)
    header = json.loads(found.path.read_text().splitlines()[0])
    assert header["made_by"] == {
        "commit": "abc",
        "fraction": 0.1,
        "expected": pytest.approx(0.076, abs=1e-3),
    }
    assert header["settings"]["task"] == {"name": "chain", "distractors": 2, "steps": 3}


def test_the_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 5, 3], [1, 2, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 2, 3, 4], [1, 2, 3]) == 3
    assert first_difference([1, 2], []) is None
