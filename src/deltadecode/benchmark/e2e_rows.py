"""Rows, table and words of the end-to-end benchmark."""

from __future__ import annotations

from typing import Any

from deltadecode.benchmark.results import row

SIDES = ("stock", "delta")
PEER = "stock vLLM"
Found = dict[str, list[dict[str, Any]]]


def say(item: dict[str, Any]) -> str:
    """One measurement in words.

    Parameters
    ----------
    item : dict
        Of a worker.

    Returns
    -------
    str
    """
    if item["kind"] == "start":
        return f"engine up after {item['seconds']:.0f} s"
    if item["kind"] == "step":
        return (
            f"batch {item['batch']}, context {item['context']}: {item['step_ms']:.2f} ms a step, "
            f"prefill {item['prefill_s']:.2f} s"
        )
    if item["kind"] == "decode":
        return f"decoded to {item['tokens']} tokens in {item['total_s']:.1f} s"
    return f"profile: {item.get('graph_kernels', 'no')} kernels in the graph of a step"


def rows(name: str, found: Found) -> list[dict[str, Any]]:
    """Rows of what both sides have measured.

    Parameters
    ----------
    name : str
        Of the model.
    found : dict
        Side -> its measurements, in one order.

    Returns
    -------
    list of dict
        See :func:`deltadecode.benchmark.results.row`.
    """
    if set(found) != set(SIDES):
        return []
    made = []
    for stock, delta in zip(found["stock"], found["delta"], strict=False):
        extras = {"batch": stock.get("batch"), "model": name}
        where = f"{name}, batch {stock.get('batch')}"
        if stock["kind"] == "step":
            context = stock["context"]
            extras["context"] = context
            made += [
                row(f"{where}, decode step at {context}", PEER, "ms", delta["step_ms"],
                    stock["step_ms"], quartiles=delta["quartiles_ms"],
                    peer_quartiles=stock["quartiles_ms"], **extras),
                row(f"{where}, prefill of {context}", PEER, "s", delta["prefill_s"],
                    stock["prefill_s"], **extras),
            ]  # fmt: skip
        elif stock["kind"] == "decode":
            made.append(
                row(f"{where}, {stock['prompt']} to {stock['tokens']} tokens", PEER, "s",
                    delta["total_s"], stock["total_s"], tokens_per_s=delta["tokens_per_s"],
                    peer_tokens_per_s=stock["tokens_per_s"], **extras)
            )  # fmt: skip
    return made
