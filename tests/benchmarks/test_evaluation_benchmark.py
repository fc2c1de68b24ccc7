"""The benchmark of the evaluation's own speed."""

import json

from benchmarks.evaluation import run as evaluation


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
