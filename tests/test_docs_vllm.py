"""The figures of the page of vLLM are those of the files that it names."""

from functools import cache
from statistics import median

from docs_figures import compared, rounded, rows_of, served
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
    assert shown == 21


def test_what_the_host_did_to_short_steps_is_on_the_pages():
    text = flowing("docs/vllm.md")
    quick, slow, part = (
        row
        for name in ("20261128-r1-1.5b", "20261130-r1-1.5b-reasoning")
        for row in rows_of(f"serve-{name}.json", workload="reasoning")
    )
    ratios = [rounded(row["theirs"] / row["ours"], 2) for row in (slow, quick)]
    assert "gave {}, where 05cf970 on another one gave {}.".format(*ratios) in text
    less = rounded(100 * (1 - slow["tok_s_theirs"] / quick["tok_s_theirs"]), 0)
    assert f"Stock served {less} % less." in text
    tokens = [rounded(row["tpot_p50_ours"], 1) for row in (slow, quick)]
    assert "a token took {} ms at inf in place of {}.".format(*tokens) in text
    first = rounded(part["ttft_p99_ours"], 0), rounded(part["ttft_p99_theirs"], 1)
    assert f"tokens come {rounded(part['tpot_ratio'], 2)} times as quickly" in text
    assert "slowest first ones after {} ms, stock's after {}.".format(*first) in text
    assert f"on another machine the first was {ratios[0]} |" in flowing("docs/operating.md")
    (headline,) = rows_of("e2e-20261130-r1-headline.json", kind="headline")
    both = f"{rounded(headline['theirs'] / headline['ours'], 2)} and {ratios[0]}"
    assert f"On another machine rows 1 and 5 gave [{both}](docs/vllm.md#measured)." in flowing(
        "README.md"
    )


def test_rounds_and_curves_of_the_headline_are_on_the_page_of_vllm():
    text = flowing("docs/vllm.md")
    (thrice,) = rows_of("e2e-20261130-r1-headline.json", kind="headline")
    (again,) = rows_of("e2e-20261129-r1-headline.json", kind="headline")
    times = zip(thrice["rounds_theirs"], thrice["rounds_ours"], strict=True)
    rounds = [rounded(stock / ours, 2) for stock, ours in times]
    assert "three rounds, {}, {} and {}; nothing beside".format(*rounds) in text
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


def test_what_two_gpus_measured_is_on_the_page_of_vllm():
    text = flowing("docs/vllm.md")
    files = (f"e2e-20261130-qwen3-8b-tp2{tag}.json" for tag in ("-sync", ""))
    together, alone = (rows_of(file)[0]["ours"] for file in files)
    longer = f"{rounded((together / alone - 1) * 100, 0)} % longer"
    times = f"{rounded(together, 2)} ms in place of {rounded(alone, 2)}."
    assert f"step of the 8B shape {longer} ([above](#measured)): {times}" in text
    stages = served("serve-20261130-qwen3-8b-pp2.json", "chat", "tok_s", 0, "")[2]
    assert f"where DELTA serves {stages} of stock's tokens a second" in text
