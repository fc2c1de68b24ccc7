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


def test_company_on_the_machine_shows_as_the_page_of_vllm_says():
    text = flowing("docs/vllm.md")
    alone, beside = (
        rows_of(f"serve-{name}.json", workload="reasoning", rate="inf")[0]
        for name in ("20261128-r1-1.5b", "20261130-r1-1.5b-reasoning")
    )
    assert f"answer {rounded(beside['itl_p50_theirs'], 1)} ms after each other (p50)" in text
    assert f"where it was {rounded(alone['itl_p50_theirs'], 1)} ms at 05cf970" in text
    assert abs(beside["tpot_p50_theirs"] / alone["tpot_p50_theirs"] - 1) < 0.05
    operating = flowing("docs/operating.md")
    ratio = rounded(beside["theirs"] / beside["ours"], 2)
    assert f"with tests at work on the machine's other cores it was {ratio}" in operating
    (headline,) = rows_of("e2e-20261130-r1-headline.json", kind="headline")
    both = f"{rounded(headline['theirs'] / headline['ours'], 2)} and {ratio}"
    readme = flowing("README.md")
    assert f"On busy cores rows 1 and 5 gave [{both}](docs/vllm.md#measured)." in readme
    (again,) = rows_of("e2e-20261129-r1-headline.json", kind="headline")
    for curve in ("curve_theirs", "curve_ours"):
        assert 1 < median_of_curves(headline[curve], again[curve], 4000) < 1.01
    here, there, far, before = (
        rounded(median_of_curves(row["curve_theirs"], row["curve_ours"], context), 2)
        for context in (4000, 12000)
        for row in (headline, again)
    )
    assert here == there
    assert f"÷ DELTA is {here} there in both, and {far} and {before} from 12,000" in text


def test_what_two_gpus_measured_is_on_the_page_of_vllm():
    text = flowing("docs/vllm.md")
    files = (f"e2e-20261130-qwen3-8b-tp2{tag}.json" for tag in ("-sync", ""))
    together, alone = (rows_of(file)[0]["ours"] for file in files)
    longer = f"{rounded((together / alone - 1) * 100, 0)} % longer"
    times = f"{rounded(together, 2)} ms in place of {rounded(alone, 2)}."
    assert f"step of the 8B shape {longer} ([above](#measured)): {times}" in text
    stages = served("serve-20261130-qwen3-8b-pp2.json", "chat", "tok_s", 0, "")[2]
    assert f"where DELTA serves {stages} of stock's tokens a second" in text
