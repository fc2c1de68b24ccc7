"""The load benchmark: workloads, command lines, folders of runs, tables; no server is started."""

import json
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.command import launch
from benchmarks.serve.__main__ import serve as command
from benchmarks.serve.client import ClientError, bench_command, server_values, values
from benchmarks.serve.figure import draw, points
from benchmarks.serve.model import write_tokenizer
from benchmarks.serve.options import make_options
from benchmarks.serve.report import fill, make_result, markdown, table
from benchmarks.serve.run import Load, check_facts, requests_per_second, run_file, write_json
from benchmarks.serve.server import Server, ServerError, last_words, parse_metrics
from benchmarks.serve.workloads import WORKLOADS, Rate, find_workloads, parse_rates, seed

INF = Rate(float("inf"))


def measured(tok_s, ms, requests=8):
    """A file of ``vllm bench serve``, as far as it is read."""
    found = {
        "completed": requests, "num_prompts": requests, "output_throughput": tok_s,
        "request_throughput": tok_s / 100, "duration": 5.0, "total_input_tokens": 64,
        "total_output_tokens": 800,
    }  # fmt: skip
    for metric, more in (("ttft", 10), ("tpot", 1), ("itl", 1)):
        found |= {f"p50_{metric}_ms": ms * more, f"p99_{metric}_ms": 2 * ms * more}
    return found


def put(options, side, workload, rate, tok_s, ms, number=1):
    run = {
        "workload": {**vars(workload)}, "rate": str(rate), **values(measured(tok_s, ms)),
        "per_second": None if rate.saturates else rate.value, "preemptions": 0,
    }  # fmt: skip
    write_json(run_file(options.raw, side, workload, rate, number), run)


@pytest.fixture
def options(tmp_path):
    return make_options(
        shape="tiny", names=["chat"], rates=["2", "inf"], input_len=100, output_len=20,
        requests=8, concurrency=4, raw=tmp_path / "raw", flags=["--kv-cache-dtype", "fp8"],
    )  # fmt: skip


@pytest.fixture
def filled(options):
    """A folder with all runs of both servers; DELTA is twice as fast at inf."""
    check_facts(options)
    (chat,) = options.workloads
    put(options, "stock", chat, INF, 1000.0, 4.0)
    put(options, "DELTA", chat, INF, 2000.0, 2.0)
    put(options, "stock", chat, Rate(2.0), 200.0, 3.0)
    put(options, "DELTA", chat, Rate(2.0), 200.0, 2.5)
    write_json(options.raw / "stock-server.json", {"kv_tokens": 9, "jit_compilations": 0})
    return options


# Workloads and rates


def test_workloads_are_those_that_servers_see():
    lengths = {name: (one.prefix, one.prompt, one.output) for name, one in WORKLOADS.items()}
    assert lengths == {
        "reasoning": (0, 512, 8192),
        "long-context": (0, 32768, 1024),
        "chat": (0, 1024, 256),
        "shared-prefix": (16384, 512, 512),
    }


def test_given_numbers_replace_those_of_a_workload():
    chat, shared = find_workloads(["chat", "shared-prefix"], requests=3, prefix_len=64)
    assert (chat.requests, chat.prefix, chat.output) == (3, 0, 256)
    assert (shared.requests, shared.prefix) == (3, 64)


def test_all_at_once_runs_first_since_rates_may_be_parts_of_it():
    rates = parse_rates(["0.5x", "4", "inf"])
    assert [str(rate) for rate in rates] == ["inf", "0.5x", "4"]
    assert rates[1] == Rate(0.5, of_stock=True)
    with pytest.raises(ValueError, match="needs inf"):
        parse_rates(["0.5x"])
    for wrong in ("0", "-1", "x", "fast", "infx", "nan", "talk=2", "chat=fast"):
        with pytest.raises(ValueError, match=wrong):
            parse_rates([wrong])


def test_a_rate_may_be_for_one_workload(tmp_path):
    options = make_options(
        shape="tiny", names=["chat", "reasoning"], rates=["inf", "chat=0.5x"], output_len=20,
        raw=tmp_path,
    )  # fmt: skip
    runs = [f"{workload.name} {rate}" for workload, rate in options.cases()]
    assert runs == ["chat inf", "chat 0.5x", "reasoning inf"]


def test_each_run_has_prompts_of_its_own_and_both_servers_the_same():
    one, two = find_workloads(["chat", "reasoning"])
    rates = INF, Rate(2.0), Rate(0.5, of_stock=True)
    seeds = [seed(w, r, number) for w in (one, two) for r in rates for number in (1, 2, 3)]
    assert len(set(seeds)) == len(seeds)
    assert seed(one, INF) == seed(one, INF)


def test_a_part_of_stock_needs_what_stock_served(filled):
    (chat,) = filled.workloads
    half = Rate(0.5, of_stock=True)
    assert requests_per_second(filled.raw, chat, half) == 5.0
    assert requests_per_second(filled.raw, chat, Rate(3.0)) == 3.0
    run_file(filled.raw, "stock", chat, INF).unlink()
    assert requests_per_second(filled.raw, chat, half) is None


# Command lines


def test_both_servers_get_the_same_line_but_for_delta(options, tmp_path):
    stock, delta = (options.server_command(side, tmp_path) for side in ("stock", "DELTA"))
    at = delta.index("--attention-backend")
    assert delta[at + 1 : at + 3] == ["CUSTOM", "--additional-config"]
    assert json.loads(delta[at + 3]) == {"deltadecode": options.plan.to_dict()}
    assert delta[:at] + delta[at + 4 :] == stock
    assert stock[-2:] == ["--kv-cache-dtype", "fp8"]
    assert stock[stock.index("--max-model-len") + 1] == "136"
    assert stock[stock.index("--max-num-seqs") + 1] == "4"


def test_the_client_asks_for_what_the_workload_says(tmp_path):
    (one,) = find_workloads(["shared-prefix"], requests=7)
    line = bench_command(tmp_path / "m", 81, one, INF, 2, float("inf"), tmp_path / "r.json")
    given = dict(pairwise(line))
    assert line[line.index("bench") + 1] == "serve"
    assert given["--random-prefix-len"] == "16384" and given["--random-input-len"] == "512"
    assert given["--random-output-len"] == "512" and given["--num-prompts"] == "7"
    assert given["--request-rate"] == "inf" and given["--max-concurrency"] == "64"
    assert given["--percentile-metrics"] == "ttft,tpot,itl"
    assert given["--metric-percentiles"] == "50,99"
    assert given["--result-filename"] == "r.json" and "--ignore-eos" in line
    assert given["--seed"] == str(seed(one, INF, 2))


def test_prompts_keep_their_length_through_the_tokenizer(options, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(options.shape, tmp_path))
    assert tokenizer.vocab_size == len(tokenizer) == options.shape.vocabulary
    ids = [511, 0, 1, 16, 300, 300]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    # vLLM refuses a prompt with more letters than its longest tokens could have.
    assert len(tokenizer.decode(ids)) == len(ids) * max(map(len, tokenizer.get_vocab()))
    assert tokenizer.all_special_ids == []


# What is read


def test_failed_requests_are_no_measurement():
    with pytest.raises(ClientError, match="2 of 8 requests failed: Bad"):
        values({**measured(1.0, 1.0), "completed": 6}, "Bad Request")


def test_values_are_those_of_the_client():
    found = values(measured(100.0, 3.0))
    assert (found["tok_s"], found["tpot_p50"], found["tpot_p99"]) == (100.0, 3.0, 6.0)
    assert (found["ttft_p50"], found["ttft_p99"]) == (30.0, 60.0)


def test_the_server_counts_what_happened_meanwhile():
    text = """# HELP x
vllm:num_preemptions_total{engine="0"} 2.0
vllm:prefix_cache_queries_total{engine="0"} 100.0
vllm:prefix_cache_hits_total{engine="0"} 75.0
deltadecode_attended_tokens_total{a="b c"} 30.0
deltadecode_full_tokens_total{a="0"} 40.0
deltadecode_full_tokens_total{a="1"} 80.0
"""
    found = server_values({"vllm:num_preemptions_total": 1.0}, parse_metrics(text))
    assert found == {"preemptions": 1, "prefix_hits": 0.75, "attended": 0.25}
    assert server_values({}, {}) == {"preemptions": 0}


def test_the_log_says_what_went_wrong():
    assert last_words("a\nValueError: no such flag\nbye\n") == "ValueError: no such flag"
    assert last_words("a\n b  c\n\n") == "b c"
    assert last_words("") == "it said nothing"


def test_a_server_that_ends_is_reported_with_its_last_words(tmp_path):
    code = "import sys; print('RuntimeError: no memory'); sys.exit(3)"
    server = Server("stock", [sys.executable, "-c", code], tmp_path)
    with pytest.raises(ServerError, match=r"stock server ended with exit code 3: Runtime.*memory"):
        server.wait(60)
    server.stop()


def test_a_server_that_never_answers_is_ended(tmp_path):
    code = "import time; print('loading', flush=True); time.sleep(600)"
    server = Server("DELTA", [sys.executable, "-c", code], tmp_path)
    with pytest.raises(ServerError, match="did not answer within 1 s"):
        server.wait(1)
    assert server.alive()
    server.stop()
    assert not server.alive()


# Folders and results


def test_rows_have_both_servers(filled):
    result = make_result(filled)
    assert result["unfinished"] == []
    at_once, two = result["rows"]
    assert (at_once["tok_s_theirs"], at_once["tok_s_ours"], at_once["ratio"]) == (1000, 2000, 2.0)
    assert (at_once["theirs"], at_once["ours"]) == (1.0, 0.5)
    assert (at_once["tpot_ratio"], two["tpot_ratio"], two["per_second"]) == (2.0, 1.2, 2.0)
    assert at_once["ttft_p99_theirs"] == 80.0 and at_once["ttft_p99_ratio"] == 2.0
    assert result["flags"] == ["--kv-cache-dtype", "fp8"]
    assert "--server-flag '--kv-cache-dtype fp8'" in result["command"]


def test_a_run_of_one_server_is_unfinished(filled):
    (chat,) = filled.workloads
    run_file(filled.raw, "DELTA", chat, INF).unlink()
    result = make_result(filled)
    assert result["unfinished"] == ["DELTA, chat at rate inf"]
    assert [row["rate"] for row in result["rows"]] == ["2"]


def test_of_several_rounds_a_row_has_the_median_run_of_each_side(filled):
    (chat,) = filled.workloads
    thrice = replace(filled, rounds=3, rates=[INF])
    for number, stock, delta in ((2, 800.0, 2400.0), (3, 900.0, 1600.0)):
        put(thrice, "stock", chat, INF, stock, 5.0, number)
        put(thrice, "DELTA", chat, INF, delta, 1.0 + number, number)
    (row,) = make_result(thrice)["rows"]
    assert (row["rounds_theirs"], row["rounds_ours"]) == ([1000, 800, 900], [2000, 2400, 1600])
    assert (row["tok_s_theirs"], row["tok_s_ours"], row["ratio"]) == (900, 2000, 2.222)
    # Times are of the same runs.
    assert (row["tpot_p50_theirs"], row["tpot_p50_ours"]) == (5.0, 2.0)
    run_file(thrice.raw, "DELTA", chat, INF, 2).unlink()
    result = make_result(thrice)
    assert result["unfinished"] == ["DELTA, chat at rate inf, round 2"]
    # Of two, the slower.
    (row,) = result["rows"]
    assert (row["rounds_theirs"], row["rounds_ours"]) == ([1000, 900], [2000, 1600])
    assert (row["tok_s_theirs"], row["tok_s_ours"]) == (900, 1600)


def test_runs_of_other_lengths_are_not_mixed_in(filled):
    other = make_options(
        shape="tiny", names=["chat"], rates=["inf"], input_len=50, output_len=20,
        requests=8, concurrency=4, raw=filled.raw, flags=filled.flags,
    )  # fmt: skip
    assert make_result(other)["rows"] == []


def test_a_folder_of_another_commit_is_refused(filled, monkeypatch):
    check_facts(filled)
    monkeypatch.setenv("DELTADECODE_COMMIT", "abc")
    with pytest.raises(ValueError, match=r"has runs with commit .* got 'abc'"):
        check_facts(filled)


def test_nothing_is_started_when_all_runs_are_there(filled, monkeypatch):
    monkeypatch.setattr("benchmarks.serve.run.Server", None)
    assert Load(filled).run()


@pytest.mark.parametrize(("together", "rounds"), [(False, 1), (True, 1), (True, 2)])
def test_both_servers_in_turn_or_each_run_on_both(options, monkeypatch, together, rounds):
    """In turn, the second server starts when the first one is gone."""
    events = []

    class FakeServer:
        def __init__(self, side, command, folder, variables):
            self.side = side
            events.append(f"start {side}")
            assert ("--kv-cache-memory-bytes" in command) == together

        wait = warm_up = lambda self, *_: 1.0
        alive, facts = lambda self: True, lambda self: {"kv_tokens": 9, "jit_compilations": 0}

        def stop(self):
            events.append(f"stop {self.side}")

    def drive(server, tokenizer, workload, rate, number, *rest):
        events.append(f"{server.side} {rate}" + f" {number}" * (rounds > 1))
        return values(measured(100.0, 1.0))

    monkeypatch.setattr("benchmarks.serve.run.Server", FakeServer)
    monkeypatch.setattr("benchmarks.serve.run.drive", drive)
    asked = replace(options, start_together=together, rounds=rounds)
    assert Load(asked).run() and len(make_result(asked)["rows"]) == 2
    if rounds > 1:
        assert events[2:6] == ["stock inf 1", "DELTA inf 1", "stock inf 2", "DELTA inf 2"]
        assert events[6:8] == ["stock 2 1", "DELTA 2 1"] and len(events) == 12
    elif together:
        assert events[:4] == ["start stock", "start DELTA", "stock inf", "DELTA inf"]
        assert events[4:] == ["stock 2", "DELTA 2", "stop stock", "stop DELTA"]
    else:
        assert events[:4] == ["start stock", "stock inf", "stock 2", "stop stock"]
        assert events[4:] == ["start DELTA", "DELTA inf", "DELTA 2", "stop DELTA"]


def test_a_shared_prefix_is_in_the_cache_once():
    (shared,) = find_workloads(["shared-prefix"], concurrency=2)
    assert shared.kv_tokens == 16384 + 2 * (512 + 512 + 128)


def test_table_and_figure_show_every_row(filled, tmp_path):
    result = make_result(filled)
    text = markdown(result)
    first = "| chat: 100 in, 20 out | inf | 1,000 | 2,000 | 2.00 | 40.0, 80.0 | 20.0, 40.0 | "
    assert first + "4.0, 8.0 | 2.0, 4.0 | 2.00 |" in text
    assert "| 2/s | 200 | 200 | 1.00 |" in text
    assert table(result).row_count == 6
    assert points(result)["chat"]["ours"] == [(200.0, 2.5, "2"), (2000.0, 2.0, "inf")]
    pytest.importorskip("matplotlib")
    draw(result, tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 1000


def test_a_page_gets_the_tables_of_all_files(filled, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- eval:load -->\nold\n<!-- /eval:load -->\nb\n")
    result = make_result(filled)
    files = [tmp_path / f"serve-20990101-{name}.json" for name in ("one", "two")]
    for file in files:
        write_json(file, result)
    files[0].with_suffix(".png").touch()
    fill(page, files)
    text = page.read_text()
    assert "old" not in text and text.startswith("a\n") and text.endswith("\nb\n")
    assert "| [20990101-one](serve-20990101-one.json) | tiny |" in text
    assert text.count(markdown(result)) == 2
    assert text.count("![") == 1 and "`--kv-cache-dtype fp8`" in text


def test_the_load_table_of_the_docs_is_that_of_the_files():
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "vllm.md").read_text(encoding="utf-8")
    block = page.split("<!-- eval:load -->")[1].split("<!-- /eval:load -->")[0]
    for line in block.splitlines():
        if line.startswith("| [") and "(../benchmarks/results/serve-" in line:
            name = line.split("(../benchmarks/results/")[1].split(")")[0]
            result = json.loads((root / "benchmarks" / "results" / name).read_text("utf-8"))
            assert markdown(result) in block


# The command


@pytest.fixture
def refused(outcome, tmp_path):
    def call(*arguments):
        code, out, err = outcome(
            partial(launch, command), "--shape", "tiny", "--raw", tmp_path / "r", *arguments
        )
        assert (code, out) == (2, "") and err.count("\n") == 1
        return err

    return call


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workload", "fast"], "'fast'"),
        (["--workload", "chat", "--rate", "soon"], "'soon'"),
        (["--workload", "chat", "--input-len", "9000"], "9256"),
        (["--workload", "chat", "--side", "ours"], "'ours'"),
        (["--workload", "chat", "--server-flag", "--port 80"], "--port"),
        (["--workload", "chat", "--minutes", "0"], "--minutes"),
        (["--workload", "chat", "--report"], "has no runs"),
        (["--workload", "chat", "--raw", __file__], "--raw"),
        (["--workload", "chat", "--acceptance", "0.9"], "acceptance is for --lossless"),
        (["--docs", "page.md"], "--result"),
        (["--docs", "none.md", "--result", "none.json"], "none.md"),
        (["--plan", "none.json", "--workload", "chat"], "'none.json'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(refused, arguments, named):
    assert named in refused(*arguments)


def test_a_report_needs_no_server(filled, outcome, tmp_path):
    code, out, err = outcome(
        partial(launch, command), "--shape", "tiny", "--workload", "chat", "--rate", "2",
        "--rate", "inf", "--input-len", 100, "--output-len", 20, "--requests", 8,
        "--concurrency", 4, "--server-flag", "--kv-cache-dtype fp8", "--raw", filled.raw,
        "--rounds", 2, "--report", "--json", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert [row["ratio"] for row in result["rows"]] == [2.0, 1.0]
    assert "--rounds 2" in result["command"] and len(result["unfinished"]) == 4
    assert list((tmp_path / "out").glob("serve-*.json"))


def test_lossless_mode_is_named_in_every_row_and_keeps_its_own_folder(filled, tmp_path):
    settings = dict(
        shape="tiny", names=["chat"], rates=["inf"], input_len=100, output_len=20, requests=8,
        concurrency=4, lossless=True, drafts=2, acceptance=0.5,
    )  # fmt: skip
    one = make_options(**settings, raw=tmp_path / "lossless")
    drafts = json.loads(one.server_command("DELTA", tmp_path)[-1])
    assert drafts["synthetic_acceptance_rates"] == [0.5, 0.25]
    assert "--speculative-config" not in one.server_command("stock", tmp_path)
    check_facts(one)
    (chat,) = one.workloads
    put(one, "stock", chat, INF, 1000.0, 4.0)
    put(one, "DELTA", chat, INF, 1500.0, 3.0)
    (row,) = make_result(one)["rows"]
    assert row["workload"] == "chat, lossless with 2 drafts, synthetic acceptance 0.5"
    assert "lossless with 2 drafts, synthetic acceptance 0.5" in row["case"]
    with pytest.raises(ValueError, match="has runs with"):
        check_facts(make_options(**settings, raw=filled.raw))
