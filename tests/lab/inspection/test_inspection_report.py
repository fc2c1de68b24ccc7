"""The report of models with learned sinks, an off-by-one softmax, or gates, from end to end."""

import json

import pytest
from inspection_models import full_layers, make, prompt
from test_inspection_pages import config_for

from deltadecode.lab.inspection.page import write_page
from deltadecode.lab.inspection.report import make_report, result_rows, summary_lines
from deltadecode.lab.inspection.run import inspect_text

MADE_BY = {"model": {"name": "<tiny>", "class": "Tiny"}, "text": "random"}


@pytest.mark.parametrize(
    ("name", "extra"), [("learned", "learned"), ("off-by-one", "learned"), ("gated", "gate")]
)
def test_models_that_deal_with_sinks_are_reported_alike(name, extra, tmp_path):
    model = make(name)
    layers = full_layers(model)
    told = []
    found = inspect_text(
        model, prompt(model, 49)[0].tolist(), 40, config_for(model), loss_steps=4,
        progress=lambda what, done: told.append((what, done)),
    )  # fmt: skip
    report = make_report(found, "t{}".format, MADE_BY, epsilon=0.05, least_queries=4)
    assert report["layers"] == layers
    for each in report["sinks"]["layers"]:
        values = each[extra]
        assert len(values) == 4 and all(0 < value < 1 for value in values)
        assert ({"learned", "gate"} - {extra}).isdisjoint(each)
    assert len(report["sinks"]["hidden"]) == 4
    if name == "gated":  # linear-attention layers keep a state that rows of a text cannot share
        assert "keeps a LinearAttentionLayer" in report["losses"]["refused"]
    else:
        assert report["losses"]["removal"][0]["agreement"] == 1.0
    sparse = [layer for layer in layers if layer != layers[0]]
    assert [each["layer"] for each in report["recall"]] == sparse
    assert report["sinks"]["sinks"][0]["token"].startswith("t")
    assert any("strongest sink: token" in line for line in summary_lines(report))
    tried = [
        each for group in ("removal", "sink_pages", "factors") for each in report["losses"][group]
    ]
    assert len(result_rows(report)) == max(len(tried) - 1, 0) + len(sparse)
    write_page(report, found.pages, tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert "<title>&lt;tiny&gt;: what its attention does</title>" in text
    assert json.dumps(report["losses"]["pages"]) in text
    # Work only ever gets done.
    shares = [done for _, done in told]
    assert shares == sorted(shares) and shares[-1] <= 1.0
    assert told[0][0] == "attention"
