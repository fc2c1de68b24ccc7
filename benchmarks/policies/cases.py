"""What is compared: policies with a budget, tasks, and the lengths of their contexts."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltadecode.config import DeltaConfig
from deltadecode.lab.evaluation.cells import Cell
from deltadecode.lab.policies import make_policy
from deltadecode.lab.policies.kascade import Kascade

CONTEXTS = (4000, 2000, 7500)  # tokens, in the order in which they run
TASKS = {
    "needle": "needle:kind=single:length={context}",
    "multi-key": "needle:kind=multikey:length={context}",
    "tracking": "tracking:length={context}",
    "docs": "text:stdlib-docs:context={context}:tokens=128",
    "code": "text:stdlib-code:context={context}:tokens=128",
}
TEXTS = ("docs", "code")
_DEVELOPMENT = "email/_header_value_parser.py"  # for Kascade's fit, of Python's library
_ANCHORS = 5  # of Kascade, as in the paper for models of 32 layers


@dataclass(frozen=True)
class Entry:
    """A policy under the name that tables and figures show."""

    name: str
    spec: str  # as parse_policy reads it
    budget: int

    @property
    def cell(self) -> Cell:
        """What the evaluation runs."""
        return Cell(self.spec, 0 if self.spec == "full" else self.budget)


def entries(
    model: Any, budget: int, plan: DeltaConfig | None, fit: Callable[[Sequence[int]], list[Path]]
) -> list[Entry]:
    """Every policy, in the order of the table; most important ones first.

    Peers that choose at a few layers come with the layers of their papers, and with those that
    DELTA reads in full, at equal reads. ``fit`` gives files of fits of Kascade, by numbers of
    anchors.
    """
    default = DeltaConfig.for_model(model)
    layers = "+".join(map(str, default.delta_layers)) + "+"
    more = equal_anchors(model, budget)
    few_file, more_file = fit([_ANCHORS, more])
    specs = {
        "full attention": "full",
        "DELTA, default plan": "delta",
        f"Kascade, {_ANCHORS} anchors": f"kascade:fit={few_file}",
        "LessIsMore, DELTA's layers": f"lessismore:layers={layers}",
        "OmniKV, DELTA's layers": f"omnikv:layers={layers}:wait=0",
        "LessIsMore": "lessismore",
        "OmniKV": "omnikv",
        f"Kascade, {more} anchors": f"kascade:fit={more_file}",
        "Quest, each query head": "quest",
        "Quest, each KV head": "quest-kv",
        "TidalDecode, DELTA's layers": f"tidal-kv:layers={layers}",
        "TidalDecode": "tidal-kv",
        "StreamingLLM": "streaming",
        "SnapKV": "snapkv",
        "H2O": "h2o",
        "RaaS, prompt evicted": "raas-evict",
        "KeyDiff": "keydiff",
        "Random Attention, prompt evicted": "random-attention-evict",
        "random pages": "random",
        "oracle: each layer chooses": "oracle",
    }
    found = [Entry(name, spec, budget) for name, spec in specs.items()]
    if plan is not None:
        tokens = plan.page_size * plan.budget_pages
        found.insert(2, Entry("DELTA, calibrated plan", plan_spec(plan), tokens))
    return found


def plan_spec(plan: DeltaConfig) -> str:
    """DELTA with a plan, as a policy; its budget is the cell's."""
    options = asdict(plan)
    options.pop("budget_pages")
    texts = {
        name: "+".join(map(str, value)) + "+" if isinstance(value, (tuple, list)) else str(value)
        for name, value in options.items()
        if value is not None
    }
    return "delta" + "".join(f":{name}={text}" for name, text in texts.items())


def equal_anchors(model: Any, budget: int, length: int = CONTEXTS[0]) -> int:
    """Anchors with which Kascade moves as many bytes as DELTA's default plan, at most."""
    import numpy as np

    lengths = np.array([float(length)])

    def moved(spec: str) -> float:
        policy = make_policy(spec, model, budget)
        return float((policy.expected(lengths, length) + policy.overhead(lengths))[0])

    depth = len(make_policy("full", model, 1).layout.layers)
    allowed = moved("delta")
    return max(
        (count for count in range(1, depth + 1) if moved(f"kascade:anchors={count}") <= allowed),
        default=1,
    )


def fit_kascade(
    model: Any, tokenizer: Any, budget: int, counts: Sequence[int], tokens: int, folder: Path
) -> list[Path]:
    """Files of fits with so many anchors each, made once, to a text that no task has.

    ``tokens`` of it go through the model. Processes that fit at a time write the same.
    """
    import torch

    from deltadecode.engines.transformers import DeltaCache
    from deltadecode.lab.tasks.text import Text

    paths = [folder / f"kascade-{count}.json" for count in counts]
    if all(path.exists() for path in paths):
        return paths
    text = Path(sysconfig.get_paths()["stdlib"]) / _DEVELOPMENT
    (piece,) = Text(file=str(text), context=tokens, tokens=1).pieces(tokenizer, [0])
    ids = torch.tensor([piece[:tokens]], device=model.device)
    policy = make_policy(f"kascade:anchors={counts[0]}", model, budget)
    assert isinstance(policy, Kascade)
    with policy.decoding(model), torch.inference_mode():
        cache = DeltaCache(model.config)
        model.generate(ids, max_new_tokens=1, do_sample=False, past_key_values=cache)
    assert policy.development is not None
    folder.mkdir(parents=True, exist_ok=True)
    for path, count in zip(paths, counts, strict=True):
        part = path.with_suffix(f".{os.getpid()}")
        policy.development.fit(count).save(part)
        part.replace(path)
    return paths


def save_names(folder: Path, found: list[Entry]) -> None:
    """Keep the names of the policies beside their samples, for the report."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"names.{os.getpid()}"
    names = {entry.spec: entry.name for entry in found}
    part.write_text(json.dumps(names, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(folder / "names.json")
