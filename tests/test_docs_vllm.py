"""The figures of the page of vLLM are those of the files that it names."""

from functools import cache
from statistics import median

from docs_figures import compared, gain, rounded, rows_of
from docs_pages import flowing, read

page = cache(read)


def median_of_curves(some, others, context):
    """Median of one curve's steps ÷ the other's, over points [tokens, ms] from a context on."""
    points = zip(some, others, strict=True)
    return median(one / other for (at, one), (_, other) in points if at >= context)


def test_engines_measured_in_vllm_are_those_of_the_files():
    def written(row):
        places, unit = {"headline": (1, "s"), "prefill": (4, "s")}.get(row["kind"], (2, "ms"))
        stock, ours, ratio = compared(row, places, unit)
        if row["kind"] == "headline":
            stock += f", {row['tok_s_theirs']:,.0f} tok/s"
            ours += f", {row['tok_s_ours']:,.0f} tok/s"
        return [stock, ours, ratio]

    vllm, shown = page("docs/vllm.md"), 0
    for cells, links in zip(vllm.rows, vllm.row_links, strict=True):
        if len(cells) != 5 or not links or "/results/e2e-" not in links[0]:
            continue
        rows = rows_of(links[0].rpartition("/")[2])
        assert cells[2:] in [written(row) for row in rows], cells
        shown += 1
    assert shown == 24


HEADLINES = {
    tag: rows_of(f"e2e-{name}.json", kind="headline")[0]
    for tag, name in (
        ("again", "20261129-r1-headline"),
        ("thrice", "20261130-r1-headline"),
        ("second", "20261130-r1-headline-v2"),
        ("own", "20261130-r1-headline-own"),
        ("own again", "20261130-r1-headline-again"),
    )
}
REASONING = {
    tag: rows_of(f"serve-{name}.json", workload="reasoning")
    for tag, name in (
        ("05cf970", "20261128-r1-1.5b"),
        ("62db241", "20261130-r1-1.5b-reasoning"),
        *((tag, f"20261130-r1-1.5b-reasoning-{tag}") for tag in ("v1", "v2", "v2b", "mp")),
    )
}


def test_what_the_host_did_to_short_steps_is_on_the_pages():
    text = flowing("docs/vllm.md")
    at_once = {tag: rows[0] for tag, rows in REASONING.items()}
    gains = {tag: gain(row) for tag, row in at_once.items()}
    plain = [gains[tag] for tag in ("05cf970", "62db241", "v1")]
    machines = "gave {} (05cf970), {} (62db241, with nothing beside) and {} (782c93a)."
    assert machines.format(*plain) in text
    assert f"{gains['v2']} where the first model runner gave {gains['v1']} at the same" in text
    assert f"{gains['mp']} where there was {gains['v2b']} without it just before" in text
    sides = ("ours", "theirs")
    more = [rounded(at_once["mp"][f"tok_s_{s}"] / at_once["v2b"][f"tok_s_{s}"], 2) for s in sides]
    served = "serves {} times the tokens a second that it served without, stock {} times."
    assert served.format(*more) in text
    steps = [row[f"tpot_p50_{side}"] for row in at_once.values() for side in sides]
    assert (rounded(min(steps), 0), rounded(max(steps), 0)) == ("4", "7")
    without = f"{min(plain)} to {max(plain)}"
    assert f"{without} times without them;" in flowing("docs/operating.md")
    found = [gain(HEADLINES[name]) for name in ("again", "thrice", "second")]
    fewer = [*plain, gains["v2"], gains["v2b"]]
    both = "with one or none, machines gave [{} to {}](docs/vllm.md#measured) and {} to {}."
    readme = flowing("README.md")
    assert both.format(min(found), max(found), min(fewer), max(fewer)) in readme
    assert f"(row 1 on a slower one: {gain(HEADLINES['own'])});" in readme


def test_chat_with_settings_for_short_steps_is_on_the_pages():
    text, operating = flowing("docs/vllm.md"), flowing("docs/operating.md")
    (quiet,) = rows_of("serve-20261130-r1-1.5b-chat-2048.json")
    slower = f"at saturation: {gain(quiet)} times its tokens a second in 20261130-r1-1.5b-chat-2048"
    times = [rounded(quiet[f"duration_s_{side}"], 0) for side in ("theirs", "ours")]
    assert slower + ", which took {} and {} s with nothing beside.".format(*times) in text
    tokens = [rounded(quiet[f"tpot_p50_{side}"], 1) for side in ("ours", "theirs")]
    late = rounded(100 * (1 / quiet["ttft_p99_ratio"] - 1), 0)
    assert "takes {} ms there and stock's {} (TPOT p50),".format(*tokens) in text
    parts = [rounded(quiet[f"itl_p50_{side}"], 1) for side in ("ours", "theirs")]
    assert "come every {} and {} ms (ITL p50), while".format(*parts) in text
    (gpu,) = rows_of("e2e-20261130-r1-256.json", kind="profile", context=1150)
    busy = [rounded(gpu[side], 1) for side in ("ours", "theirs")]
    assert "has the GPU busy for {} and {} ms ([below]".format(*busy) in text
    assert f"slowest first tokens (p99) come {late} % later." in text
    plain = rows_of("serve-20261129-r1-1.5b.json", workload="chat", rate="inf")
    assert f"Without the settings it is {gain(plain[0])} times (20261129-r1-1.5b)." in text
    beside = rows_of("serve-20261130-r1-1.5b-chat-mp.json")
    assert "{} times at inf, {} times at 0.8 of stock's rate.".format(*map(gain, beside)) in text
    assert 4 * beside[0]["requests"] == quiet["requests"]
    assert f"DELTA served [{gain(quiet)} times stock's tokens a second](" in operating
    assert f"on the 1.5B shape ({gain(quiet)} times in a round with the settings" in operating


def test_what_arrivals_did_to_reasoning_is_on_the_page_of_vllm():
    text = flowing("docs/vllm.md")
    rows = [REASONING[tag][1] for tag in ("62db241", "v1", "v2")]
    quicker = "come {} times as quickly with DELTA; those of -v1 {} and those of -v2 {} times."
    assert quicker.format(*(rounded(row["tpot_ratio"], 2) for row in rows)) in text
    late = [rounded(row[f"ttft_p99_{side}"], 0) for side in ("ours", "theirs") for row in rows]
    assert "come after {}, {} and {} ms, stock's after {}, {} and {}.".format(*late) in text


def test_rounds_and_curves_of_the_headline_are_on_the_page_of_vllm():
    text = flowing("docs/vllm.md")
    again, thrice = HEADLINES["again"], HEADLINES["thrice"]
    for tag in ("thrice", "second", "own", "own again"):
        row, beside = HEADLINES[tag], "other work" if tag == "second" else "nothing"
        times = zip(row["rounds_theirs"], row["rounds_ours"], strict=True)
        *rounds, last = [rounded(stock / ours, 2) for stock, ours in times]
        count = ("two", "three")[len(rounds) - 1]
        assert f"{count} rounds, {', '.join(rounds)} and {last}; {beside}" in text
    for tag, waited in (
        ("second", "waited for the GPU for {} % of its time and stock's for {} %."),
        ("own", "waited for its worker for {} % of its time and stock's for {} %."),
        ("own again", "waited for its worker for {} % of its time there, and stock's for {} %."),
    ):
        waits = [rounded(100 * HEADLINES[tag][f"waited_{side}"], 0) for side in ("ours", "theirs")]
        assert waited.format(*waits) in text
    late = {}
    for side in ("ours", "theirs"):
        new, old = thrice[f"curve_{side}"], again[f"curve_{side}"]
        assert 1 < median_of_curves(new, old, 4000) < 1.01
        late[side] = [
            at for (at, one), (_, other) in zip(new, old, strict=True) if one / other > 1.1
        ]
    counts = len(late["ours"]), len(thrice["curve_ours"]), len(late["theirs"])
    assert "{} of DELTA's {} points and {} of stock's".format(*counts) in text
    assert max(late["theirs"]) < 4000
    here, there, far, before = (
        rounded(median_of_curves(row["curve_theirs"], row["curve_ours"], context), 2)
        for context in (4000, 12000)
        for row in (thrice, again)
    )
    assert f"÷ DELTA is {here} there, {there} in [again], and from 12,000" in text
    assert f"tokens on {far} and {before}." in text


def test_what_a_process_for_the_worker_did_to_the_headline_is_on_the_page_of_vllm():
    text, own, again = flowing("docs/vllm.md"), HEADLINES["own"], HEADLINES["again"]
    ours, before = own["curve_ours"], again["curve_ours"]
    assert abs(median_of_curves(ours, before, 5300) - 1) < 0.005
    less = 1 - median_of_curves(own["curve_theirs"], again["curve_theirs"], 5300)
    assert f"those of [again], and stock's {rounded(100 * less, 1)} % less (median)" in text
    short = [step for at, step in ours if at < 5300]
    (tokens, first), (_, other) = ours[0], HEADLINES["own again"]["curve_ours"][0]
    least, most = (rounded(step, 1) for step in (min(short), max(short)))
    there = f"{rounded(first, 2)} ms at {tokens} tokens. In [own again] they take"
    assert f"take {least} to {most} ms: {there} {rounded(other, 2)} ms there," in text


def test_what_two_gpus_measured_is_on_the_page_of_vllm():
    text = flowing("docs/vllm.md")
    files = (f"e2e-20261130-qwen3-8b-tp2{tag}.json" for tag in ("-sync", ""))
    together, alone = (rows_of(file)[0]["ours"] for file in files)
    longer = f"{rounded((together / alone - 1) * 100, 0)} % longer"
    times = f"{rounded(together, 2)} ms in place of {rounded(alone, 2)}."
    assert f"step of the 8B shape {longer} ([above](#measured)): {times}" in text
    (chat,) = rows_of("serve-20261130-qwen3-8b-pp2.json")
    (row,) = rows_of("serve-20261130-qwen3-8b-pp2-long.json")
    stages = "serves {} of stock's tokens a second in chat, and {} times as many with long contexts"
    quicker = f"where an output token takes 1 / {rounded(row['tpot_ratio'], 2)} of the time"
    assert f"{stages.format(gain(chat), gain(row))}, {quicker}" in text
