"""The figures of the page of vLLM are those of the files that it names."""

from functools import cache
from statistics import median

from docs_figures import rounded, rows_of, served
from docs_pages import read

page = cache(read)
SIDES = ("theirs", "ours")


def median_of_curve(file, context):
    """Stock ÷ DELTA in the middle one of a headline's points from a context on."""
    (row,) = rows_of(file, kind="headline")
    points = zip(row["curve_theirs"], row["curve_ours"], strict=True)
    return median(stock / ours for (at, stock), (_, ours) in points if at >= context)


def test_engines_measured_in_vllm_are_those_of_the_files():
    def written(row):
        if row["kind"] == "headline":
            speeds = [f"{row[f'tok_s_{side}']:,.0f} tok/s" for side in ("theirs", "ours")]
            return [f"{rounded(row[s], 1)} s, {v}" for s, v in zip(SIDES, speeds, strict=True)]
        places, unit = (4, "s") if row["kind"] == "prefill" else (2, "ms")
        return [f"{rounded(row[side], places)} {unit}" for side in SIDES]

    vllm, shown = page("docs/vllm.md"), 0
    for cells, links in zip(vllm.rows, vllm.row_links, strict=True):
        if len(cells) != 5 or not links or "/results/e2e-" not in links[0]:
            continue
        rows = rows_of(links[0].rpartition("/")[2])
        assert cells[2:] in [
            [*written(row), rounded(row["theirs"] / row["ours"], 2)] for row in rows
        ], cells
        shown += 1
    assert shown == 21


def test_company_on_the_machine_shows_as_the_page_of_vllm_says():
    text = " ".join(page("docs/vllm.md").text.split())
    alone, beside = (
        rows_of(f"serve-{name}.json", workload="reasoning", rate="inf")[0]
        for name in ("20261128-r1-1.5b", "20261130-r1-1.5b-reasoning")
    )
    assert f"answer {rounded(beside['itl_p50_theirs'], 1)} ms after each other (p50)" in text
    assert f"where it was {rounded(alone['itl_p50_theirs'], 1)} ms at 05cf970" in text
    assert abs(beside["tpot_p50_theirs"] / alone["tpot_p50_theirs"] - 1) < 0.05
    operating = " ".join(page("docs/operating.md").text.split())
    ratio = rounded(beside["theirs"] / beside["ours"], 2)
    assert f"with tests at work on the machine's other cores it was {ratio}" in operating
    (headline,) = rows_of("e2e-20261130-r1-headline.json", kind="headline")
    both = f"{rounded(headline['theirs'] / headline['ours'], 2)} and {ratio}"
    readme = " ".join(page("README.md").text.split())
    assert f"On busy cores rows 1 and 5 gave [{both}](docs/vllm.md#measured)." in readme
    medians = [
        [rounded(median_of_curve(file, context), 2) for file in (
            "e2e-20261129-r1-headline.json", "e2e-20261130-r1-headline.json")]
        for context in (4000, 12000)
    ]  # fmt: skip
    assert "points of the curve is 2.08 in both, and from 12,000 tokens on 2.41 and 2.42" in text
    assert medians == [["2.08", "2.08"], ["2.42", "2.41"]]


def test_what_two_gpus_measured_is_on_the_page_of_vllm():
    text = " ".join(page("docs/vllm.md").text.split())
    files = (f"e2e-20261130-qwen3-8b-tp2{tag}.json" for tag in ("-sync", ""))
    together, alone = (rows_of(file)[0]["ours"] for file in files)
    longer = f"{rounded((together / alone - 1) * 100, 0)} % longer"
    times = f"{rounded(together, 2)} ms in place of {rounded(alone, 2)}."
    assert f"step of the 8B shape {longer} ([above](#measured)): {times}" in text
    stages = served("serve-20261130-qwen3-8b-pp2.json", "chat", "tok_s", 0, "")[2]
    assert f"where DELTA serves {stages} of stock's tokens a second" in text
