"""The figures of docs/clsa.md are those of the files that it names."""

import json
from functools import cache

from docs_figures import RESULTS, rounded, rows_of
from docs_pages import flowing, read

page = cache(read)
TEXT = flowing("docs/clsa.md")
TRAINED = "chain", "needle", "text", "mixed"


def trained(file):
    """What CLSA, YOCO and the Transformer had of each kind after a training."""
    rows = rows_of(file)
    pairs = {kind: [row for row in rows if row["case"].startswith(kind)] for kind in TRAINED}
    return {
        kind: (pair[0]["clsa"], *(row["other"] for row in pair))
        for kind, pair in pairs.items()
        if pair
    }


def test_what_training_gave_is_on_the_page_of_clsa():
    found = trained("clsa-training-20261130.json")
    shown = {cells[0]: cells[1:] for cells in page("docs/clsa.md").rows if len(cells) == 4}
    names = "chain problems", "needles", "Python text", "all three mixed as in training"
    for kind, name in zip(TRAINED, names, strict=True):
        assert shown[f"{name}, nats a token"] == [rounded(one["loss"], 3) for one in found[kind]]
        if kind in ("chain", "needle"):
            right = [f"{rounded(100 * one['answers_right'], 1)}%" for one in found[kind]]
            assert shown[f"{name}, answers right"] == right
    clsa, yoco, transformer = (one["loss"] for one in found["text"])
    better, worse = rounded(transformer - clsa, 3), rounded(clsa - yoco, 3)
    assert f"CLSA is {better} nats a token better than the Transformer, and {worse} worse" in TEXT
    shares = [100 * found[kind][0]["coverage"] for kind in TRAINED]
    assert f"{min(shares):.0f} to {max(shares):.0f}% of the weight" in TEXT


def test_what_earlier_trainings_gave_is_told_twice():
    shown = {cells[0]: cells[1:] for cells in page("training/README.md").rows if len(cells) == 3}
    for name, tokens in {"": "20 M, 70 M", "-longer": "20 M, 100 M"}.items():
        found = trained(f"clsa-training-20261129{name}.json")
        losses = [rounded(one["loss"], 3) for one in found["text"]]
        right = [rounded(100 * one["answers_right"], 1) for one in found["chain"]]
        (cells,) = (cells for first, cells in shown.items() if first.startswith(f"{tokens} ("))
        assert cells == [f"{', '.join(right)}%", f"{', '.join(losses)} nats"]
        assert f"{losses[0]}, {losses[1]} and {losses[2]}" in TEXT
        if not name:
            gap = found["text"][1]["loss"] - found["text"][2]["loss"]
            assert f"{rounded(gap, 3)} more in YOCO than in the Transformer" in TEXT


def test_speeds_of_clsa_in_vllm_are_those_of_the_file():
    name = "clsa-20261130-h200-vllm.json"
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    rows = page("docs/clsa.md").rows
    start = next(i for i, cells in enumerate(rows) if "decode at batch 64, tokens/s" in cells)
    for cells, cell in zip(rows[start + 1 :], found["cells"], strict=False):
        tried = [cell["decode_by_batch"].get(batch) for batch in ("8", "64")]
        ends = cell["prefill_tokens_per_s"], cell["end_to_end_new_tokens_per_s"]
        prefill, first, second, end = (
            "does not fit" if rate is None else rounded(rate, 0)
            for rate in (ends[0], *tried, ends[1])
        )
        assert cells == [cell["mode"], prefill, first, second, end]
    ratios = [row["ratio"] for row in rows_of(name)[:3]]
    said = "reads prompts {} times as fast, decodes {} times as fast and is {} times as fast"
    assert said.format(*(rounded(ratio, 1) for ratio in ratios)) in TEXT


def test_speeds_of_clsa_are_those_of_the_file():
    name = "clsa-20261129-h200.json"
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    first, *shown = [cells for cells in page("docs/clsa.md").rows if len(cells) == 7]
    cells = {(cell["mode"], f"{cell['context']:,}"): cell for cell in found["cells"]}
    speeds = "prefill", "decode", "end_to_end_new"
    for mode, context, *numbers in shown[: len(cells)]:
        cell = cells.pop((mode, context))
        prefill, decode, end = (rounded(cell[f"{kind}_tokens_per_s"], 0) for kind in speeds)
        of_token = rounded(cell["kv_bytes_per_token"], 0)
        assert numbers == [prefill, str(cell["batch"]), decode, end, of_token]
    assert not cells and first[0] == "mode"
    _, *parts = shown[len(found["cells"]) :]
    layers = found["layer_ms"]
    names = "ffn", "attention_sparse", "attention_dense", "index_scores", "top_k", "top_k_of_torch"
    assert len(parts) == len(layers)
    for context, *times in parts:
        layer = layers[context.replace(",", "")]
        assert times == [rounded(layer[part], 3) for part in names]
    for case, said in {
        "decode": "CLSA decodes {} times as fast as the Transformer",
        "end to end": "End to end it is {} times as fast",
        "prefill": "Prefill decides that: {} times as fast here",
    }.items():
        (row,) = rows_of(name, case=f"{case}, 131072 tokens", peer="transformer")
        assert said.format(rounded(row["ratio"], 1)) in TEXT


def test_times_of_the_top_k_are_those_of_the_file():
    expected = {
        row["case"]: [rounded(row[side], 1) for side in ("ours", "theirs")]
        for row in rows_of("kernels-20261129-topk.json")
    }
    shown = [cells for cells in page("docs/clsa.md").rows if cells[0] == "2,048"]
    assert len(shown) == sum("selection of 2048" in case for case in expected) == 5
    for k, rows, tokens, *times in shown:
        k, tokens = (number.replace(",", "") for number in (k, tokens))
        assert times == expected[f"exact selection of {k} from {rows} rows of {tokens} numbers"]
