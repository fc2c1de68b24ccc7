"""The end-to-end benchmark: shapes, workloads and the measurement, with made-up engines."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.command import launch
from benchmarks.e2e import run as e2e
from benchmarks.e2e.__main__ import e2e as command
from benchmarks.e2e.measure import RunOptions
from benchmarks.e2e.rows import curve, e2e_table, make_row
from benchmarks.e2e.shapes import SHAPES
from benchmarks.e2e.workloads import KINDS, Workload, needs, parse_point, workloads
from benchmarks.processes import Process, WorkerError
from deltadecode import DeltaConfig
from deltadecode.errors import DeltaConfigError

FAKE = str(Path(__file__).with_name("fake_engine.py"))
STEP_MS = {"stock": 4.0, "DELTA": 2.0}
SIZES = dict(points=["4:300"], steps=16, rounds=2)


@pytest.fixture
def fake(tmp_path):
    """A setup of the tiny shape with processes that make up their times."""

    def make(kinds, *failure, **options):
        setup = e2e.make_options(shape="tiny", kinds=kinds, **{**SIZES, **options})
        worker = (sys.executable, FAKE, str(tmp_path / "log"), *failure)
        return RunOptions(**{**vars(setup), "worker": worker})

    return make


def commands(tmp_path):
    return [line.split(" ") for line in (tmp_path / "log").read_text().splitlines()]


# Shapes


@pytest.mark.parametrize(
    ("name", "billions"), [("r1-1.5b", 1.777), ("qwen3-8b", 8.191), ("smollm2", 0.163)]
)
def test_shapes_have_the_parameters_of_the_models_they_are_named_after(name, billions):
    assert round(SHAPES[name].parameters / 1e9, 3) == billions


def test_a_step_gains_at_most_what_it_does_not_read():
    r1 = SHAPES["r1-1.5b"]
    assert r1.gain_by_bytes(64, 1024) == 1.0
    weights, cache = 2 * (r1.parameters - 151936 * 1536), 64 * 18000 * r1.kv_bytes()
    # 5 of 28 layers read 18,000 tokens, and 23 read 1,024.
    read = cache * (5 * 18000 + 23 * 1024) / (28 * 18000)
    assert r1.gain_by_bytes(64, 18000) == pytest.approx((weights + cache) / (weights + read))
    assert 1.0 < r1.gain_by_bytes(64, 18000, "fp8") < r1.gain_by_bytes(64, 18000)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_transformers_builds_a_model_of_that_size_from_the_config(shape, tmp_path):
    config = AutoConfig.from_pretrained(shape.write(tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == shape.parameters
    assert config.num_hidden_layers == shape.layers
    shape.plan.layer_plan(shape.layers)


def test_kv_bytes_are_those_of_both_caches_of_all_layers():
    assert SHAPES["r1-1.5b"].kv_bytes() == 28 * 2 * 2 * 128 * 2
    assert SHAPES["qwen3-8b"].kv_bytes() == 2 * SHAPES["qwen3-8b"].kv_bytes("fp8") == 147456


# Workloads


def test_measured_steps_end_at_the_context():
    (one,) = workloads(["step"], [(64, 8192)], steps=64, rounds=3)
    # Each of the four commands makes three steps more than it times.
    assert one.prompt + (8 + 3) + 3 * (64 + 3) == 8192
    assert one.new_tokens > (8 + 3) + 3 * (64 + 3) + 64 * one.prompt / 2048
    assert one.kv_tokens > 64 * 8192


def test_defaults_cover_every_kind_and_short_contexts_stay_in_the_budget():
    chosen = workloads()
    assert list(dict.fromkeys(one.kind for one in chosen)) == list(KINDS)
    shorts = [one for one in chosen if one.kind == "short"]
    assert shorts and all(one.context <= 64 * 16 for one in shorts)
    assert needs(chosen)[0] == 64
    assert 65536 < needs(chosen)[1] < 67000


def test_the_headline_decodes_from_four_tokens():
    (one,) = workloads(["headline"])
    assert (one.batch, one.prompt, one.new_tokens) == (64, 4, 18428)


def test_rounds_are_those_of_every_kind_but_a_profile():
    assert [one.rounds for one in workloads(KINDS, [(4, 400)])] == [1, 3, 3, 3, 1]
    assert [one.rounds for one in workloads(KINDS, [(4, 400)], rounds=2)] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("text", ["64", "64:", "64:0", "0:64", "a:b", "64:8192:1"])
def test_a_point_is_batch_and_context(text):
    with pytest.raises(ValueError, match=repr(text)):
        parse_point(text)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shape": "gpt"}, "'gpt'"),
        ({"kinds": ["fast"]}, "'fast'"),
        ({"points": ["64:100"], "kinds": ["step"]}, "64:100"),
        ({"points": ["16:65536"], "shape": "qwen3-8b"}, "65536"),
        ({"points": ["x"]}, "'x'"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "fp8_e5m2"),
        ({"steps": 0}, "0"),
        ({"memory_share": 0.7}, "0.7"),
        ({"memory_share": -0.2}, "-0.2"),
        ({"in_turn": True, "memory_share": 1.5}, "1.5"),
        ({"in_turn": True, "start_together": True}, "--start-together"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        e2e.make_options(**options)


def test_a_plan_of_another_model_is_refused(tmp_path):
    DeltaConfig(delta_layers=(2, 40)).save(tmp_path / "plan.json")
    with pytest.raises(DeltaConfigError, match="40"):
        e2e.make_options(plan=tmp_path / "plan.json")


def test_the_command_repeats_the_run(tmp_path):
    DeltaConfig(delta_layers=(2, 9)).save(tmp_path / "my plan.json")
    setup = e2e.make_options(
        kinds=["step"], points=["4:900"], rounds=2, plan=tmp_path / "my plan.json", in_turn=True
    )
    assert setup.command == (
        "python -m benchmarks.e2e --shape r1-1.5b --workload step --point 4:900 --steps 64 "
        "--rounds 2 --plan 'my plan.json' --in-turn"
    )
    assert setup.plan.delta_layers == (2, 9)
    assert setup.memory_share == 0.85


# The measurement


def test_rounds_alternate_and_both_engines_stay_alive(fake, tmp_path):
    e2e.run(fake(["step"]))
    sides = [(side, do) for side, do, *_ in commands(tmp_path)]
    opening = [("stock", "start"), ("DELTA", "start")]
    opening += [(s, do) for s in STEP_MS for do in ("fill", "steps")]
    rounds = [("stock", "steps"), ("DELTA", "steps")] * 2
    assert sides == [*opening, *rounds, ("stock", "drop"), ("DELTA", "drop")]


def test_in_turn_one_engine_ends_before_the_other_starts(fake, tmp_path):
    e2e.run(fake(["headline", "prefill"], in_turn=True))
    order = [(side, do) for side, do, *_ in commands(tmp_path)]
    one = ["start", "headline", "headline", "prefill", "prefill", "prefill"]
    assert order == [(side, do) for side in STEP_MS for do in one]


def test_started_together_each_gets_a_cache_of_the_size_that_is_needed(fake, tmp_path):
    setup = fake(["step"], start_together=True)
    found = e2e.run(setup)
    (step,) = setup.workloads
    # A block that vLLM keeps to itself, and the rest of each sequence's last one.
    need = step.kv_tokens + (1 + step.batch) * 128
    assert setup.spec("stock", tmp_path)["kv_bytes"] == need * 6 * 2 * 2 * 32 * 2
    assert fake(["step"]).spec("stock", tmp_path)["kv_bytes"] is None
    assert found["rows"][0]["ratio"] == 2.0


def test_only_the_delta_side_gets_the_plan(fake, tmp_path):
    setup = fake(["step"])
    assert setup.spec("stock", tmp_path)["plan"] is None
    plan = setup.spec("DELTA", tmp_path)["plan"]
    assert DeltaConfig.from_dict(json.loads(json.dumps(plan))) == SHAPES["tiny"].plan


def test_rows_are_medians_with_stock_over_delta_as_the_ratio(fake):
    found = json.loads(json.dumps(e2e.run(fake(KINDS))))
    rows = {row["kind"]: row for row in found["rows"]}
    step = rows["step"]
    assert (step["ours"], step["theirs"], step["ratio"]) == (2.0, 4.0, 2.0)
    assert (step["peer"], step["unit"], step["steps"]) == ("vllm", "ms", 32)
    assert rows["headline"]["ratio"] == 2.0 and rows["headline"]["unit"] == "s"
    assert rows["headline"]["tok_s_ours"] == round(4 * 296 / (296 * 0.002), 1)
    assert rows["headline"]["rounds_theirs"] == [296 * 0.004] * 2
    assert rows["prefill"]["rounds"] == 2
    assert rows["profile"]["profile_theirs"]["graph_launches"] == 1
    assert rows["profile"]["ratio"] == 2.0
    assert found["engines"]["stock"]["backends"] == ["stock"]
    assert found["skipped"] == found["one_side"] == []
    assert not step["within_budget"]


def test_preemptions_are_reported(fake):
    found = e2e.run(fake(["step"], "preempt"))
    assert found["rows"][0]["preemptions"] == 2 * 4


def test_the_file_grows_with_every_measurement(fake, tmp_path):
    seen = []

    def look(what, done):
        files = list((tmp_path / "out").glob("*"))
        seen.append(len(json.loads(files[0].read_text())["rows"]) if files else None)

    e2e.run(fake(["step", "prefill"]), out=tmp_path / "out", progress=look)
    assert seen[0] is None
    assert 0 in seen and 1 in seen
    assert [file.name.partition("-")[0] for file in (tmp_path / "out").iterdir()] == ["e2e"]


def test_in_turn_the_first_side_is_in_the_file_before_the_second_starts(fake, tmp_path):
    with pytest.raises(WorkerError):
        e2e.run(fake(["step"], "DELTA:start", in_turn=True), out=tmp_path / "out")
    (file,) = (tmp_path / "out").iterdir()
    (half,) = json.loads(file.read_text())["one_side"]
    assert half["side"] == "stock" and half["rounds"][0]["seconds"][0] == 0.004


def test_a_failing_engine_ends_the_run_in_one_line_and_keeps_what_was_found(fake, tmp_path):
    with pytest.raises(WorkerError) as raised:
        e2e.run(fake(["headline", "prefill"], "DELTA:prefill"), out=tmp_path / "out")
    assert str(raised.value) == "DELTA engine: RuntimeError: broken on purpose"
    (file,) = (tmp_path / "out").iterdir()
    assert [row["kind"] for row in json.loads(file.read_text())["rows"]] == ["headline"]


def test_an_engine_that_dies_is_reported_with_its_last_words(fake):
    with pytest.raises(WorkerError, match=r"^stock engine ended with exit code 7: last words$"):
        e2e.run(fake(["step"], "stock:die"))


def test_a_workload_that_does_not_fit_is_skipped_and_said(fake):
    found = e2e.run(fake(["step"], "small"))
    assert found["rows"] == []
    assert "KV cache" in found["skipped"][0]["why"]


def test_no_process_is_left(fake):
    process = Process("stock", {"plan": None}, fake(["step"]).worker)
    process.ready()
    process.stop()
    assert process._process.poll() == 0


# Result


def test_the_curve_has_the_context_of_each_step():
    points = curve([9.0, 9.0, *([0.001] * 640), *([0.003] * 640)])
    assert len(points) == 64
    assert points == sorted(points)
    assert points[0][1] == 1.0 and points[-1][1] == 3.0
    # The step after 642 others of sequences that began with 4 tokens is the first slow one.
    assert min(context for context, ms in points if ms == 3.0) in range(642, 670)


def test_the_table_has_a_line_per_workload(fake):
    found = e2e.run(fake(["step", "headline"]))
    text = io.StringIO()
    Console(file=text, width=200).print(e2e_table(found))
    assert "decode step, batch 4, context 300" in text.getvalue()
    assert text.getvalue().count("2.000×") == 2


def test_the_figure_has_a_line_per_side(fake, tmp_path):
    from benchmarks.e2e.figure import draw, lines

    found = e2e.run(fake(["step", "headline"]))
    drawn = lines(found)[4]
    assert [300, 2.0] in drawn["ours"] and [300, 4.0] in drawn["theirs"]
    assert len(drawn["ours"]) > 32
    draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no step times"):
        draw({**found, "rows": []}, tmp_path / "none.png")


def test_the_module_refuses_bad_input_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["e2e", "--point", "64-8192"])
    with pytest.raises(SystemExit) as ended:
        launch(command)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_module_ends_with_1_and_one_line_when_an_engine_fails(
    fake, monkeypatch, capsys, tmp_path
):
    setup = fake(["step"], "stock:die")
    monkeypatch.setattr(e2e, "make_options", lambda **options: setup)
    monkeypatch.setattr(e2e, "has_vllm", lambda: True)
    monkeypatch.setattr(sys, "argv", ["e2e"])
    with pytest.raises(SystemExit) as ended:
        launch(command)
    assert ended.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("deltadecode: error: ") and "last words" in error


def test_a_workload_names_its_unit():
    assert {Workload(kind, 1, 1000, 1).unit for kind in ("step", "short", "profile")} == {"ms"}
    assert {Workload(kind, 1, 1000).unit for kind in ("headline", "prefill")} == {"s"}


def test_both_engines_get_the_cache_dtype_and_rows_name_it(fake, tmp_path):
    setup = fake(["step", "prefill", "headline"], kv_cache_dtype="fp8", start_together=True)
    assert "--kv-cache-dtype fp8" in setup.command
    assert "--kv-cache-dtype" not in fake(["step"]).command
    specs = [setup.spec(side, tmp_path) for side in ("stock", "DELTA")]
    assert [spec["kv_cache_dtype"] for spec in specs] == ["fp8", "fp8"]
    plain = fake(["step", "prefill", "headline"], start_together=True).spec("stock", tmp_path)
    assert plain["kv_cache_dtype"] == "auto" and plain["kv_bytes"] == 2 * specs[0]["kv_bytes"]
    rows = e2e.run(setup)["rows"]
    assert {row["kv_cache_dtype"] for row in rows} == {"fp8"}
    assert all(row["case"].endswith(", fp8 cache") for row in rows)


def test_drafts_belong_to_single_steps():
    one = e2e.make_options(kinds=["step"], points=["16:32768"], drafts=3)
    assert [workload.case for workload in one.workloads] == [
        "decode step with 3 drafts, batch 16, context 32768"
    ]
    plain = e2e.make_options(kinds=["step"], points=["16:32768"]).workloads[0]
    assert one.workloads[0].new_tokens == 4 * plain.new_tokens
    assert (
        "--drafts 3" in one.command and "--drafts" not in e2e.make_options(kinds=["step"]).command
    )
    with pytest.raises(ValueError, match="drafts are for step, short and profile, got 'headline'"):
        e2e.make_options(drafts=3)


def test_ranks_are_said_and_divide_the_model(tmp_path, fake):
    setup = e2e.make_options(
        shape="qwen3-8b", kinds=["step"], points=["16:32768"], start_together=True,
        tensor_parallel=2, sync_heads=True,
    )  # fmt: skip
    assert "--tensor-parallel 2 --sync-heads" in setup.command
    stock, delta = (setup.spec(side, tmp_path) for side in ("stock", "DELTA"))
    assert stock["ranks"] == delta["ranks"] == 2
    assert delta["plan"] == {**setup.plan.to_dict(), "sync_heads": True}
    one = e2e.make_options(
        shape="qwen3-8b", kinds=["step"], points=["16:32768"], start_together=True
    )
    assert one.spec("stock", tmp_path)["kv_bytes"] == 2 * stock["kv_bytes"]
    assert "--tensor-parallel" not in one.command and one.of_ranks() == {}
    with pytest.raises(ValueError, match="must divide tiny's 4 heads, got 3"):
        e2e.make_options(shape="tiny", tensor_parallel=3)
    with pytest.raises(ValueError, match="--sync-heads needs --tensor-parallel of at least 2"):
        e2e.make_options(sync_heads=True)


def test_a_worker_of_its_own_is_asked_for_and_said(tmp_path, fake):
    setup = fake(["step"], worker_process=True)
    assert all(setup.spec(side, tmp_path)["worker_process"] for side in ("stock", "DELTA"))
    found = e2e.run(setup)
    assert found["worker_process"] and "--worker-process" in found["command"]
    plain = e2e.run(fake(["step"]))
    assert not plain["worker_process"] and "--worker-process" not in plain["command"]


def test_rows_say_of_how_many_ranks_they_are(fake):
    setup = replace(fake(["step"]), tensor_parallel=2)
    found = e2e.run(setup)
    for line in (found, *found["rows"]):
        assert (line["tensor_parallel"], line["sync_heads"]) == (2, False)


def test_lossless_mode_is_timed_by_the_token_and_named_with_its_acceptance(fake, tmp_path):
    setup = fake(["step"], drafts=3, lossless=True, acceptance=0.9, points=["4:400"])
    stock, delta = (setup.spec(side, tmp_path) for side in ("stock", "DELTA"))
    assert (stock["drafts"], stock["lossless"]) == (0, False)
    assert (delta["drafts"], delta["lossless"], delta["acceptance"]) == (3, True, 0.9)
    (one,) = setup.workloads
    assert one.case == (
        "token, lossless with 3 drafts, synthetic acceptance 0.9, batch 4, context 400"
    )
    # A plain step or two among the others, and all of them by the tokens that they gave.
    rounds = {"seconds": [0.003, 0.008, 0.003, 0.010], "from": 300, "to": 310, "preemptions": 0}
    made = make_row(one, [{**rounds, "tokens": 3.0}], [{**rounds, "tokens": 1.0}], [], setup.plan)
    assert (made["ours"], made["theirs"], made["ratio"]) == (2.0, 6.0, 3.0)
    assert (made["drafts"], made["synthetic_acceptance"]) == (3, 0.9)
    assert made["tokens_a_step_ours"] == [3.0]
