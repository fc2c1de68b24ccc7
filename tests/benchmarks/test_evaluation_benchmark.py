"""The benchmark of the evaluation's own speed."""

import json

from benchmarks.evaluation import run as evaluation
from benchmarks.evaluation.rows import run_rows


def test_every_policy_runs_both_ways_and_says_the_same():
    told = []
    found = evaluation.run(
        "a command",
        lambda case, done: told.append((case, done)),
        "chain:steps=2:distractors=2",
        3,
        2,
    )
    assert json.loads(json.dumps(found)) == found
    assert (found["benchmark"], found["command"]) == ("eval", "a command")
    assert [r["case"].split(",")[0] for r in found["rows"]] == ["full", "delta"]
    for each in found["rows"]:
        assert (each["problems"], each["alone"], each["equal"]) == (3, 2, True)
        assert each["ours"] > 0 and each["theirs"] > 0
    assert len(told) == 4


def test_rows_at_once_and_one_after_the_other_agree():
    told = []
    found = run_rows(
        "a command", lambda case, done: told.append(done), contexts=(90, 120), rows=7, budget=64,
        policies=("delta:recent_pages=1:dense_layers=0+1:delta_layers=2+", "streaming"),
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    assert json.loads(json.dumps(found)) == found
    cases = [line["case"] for line in found["rows"]]
    assert cases == [
        f"{name}, 7 rows behind {n} tokens" for n in (90, 120) for name in ("delta", "streaming")
    ]
    assert all(line["largest_difference"] < 1e-5 for line in found["rows"])
    assert told == sorted(told) and told[-1] < 1
