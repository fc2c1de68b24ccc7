"""A trained index: targets, loss and selection against slow loops, and training itself."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltadecode.config import DeltaConfig
from deltadecode.lab.policies import make_policy
from deltadecode.lab.rows import RowsText
from deltadecode.lab.tasks.text import code_files

TRAINING = Path(__file__).resolve().parents[2] / "training"
RESULTS = TRAINING.parent / "benchmarks" / "results"
LAYERS, VOCABULARY = 5, 40


@pytest.fixture
def index(monkeypatch):
    """The folder's modules."""
    monkeypatch.syspath_prepend(str(TRAINING))
    for name in ("model", "policy", "train"):
        importlib.import_module(f"index.{name}")
    return sys.modules["index"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_index(index, target="mean"):
    torch.manual_seed(1)
    return index.model.Index(index.model.IndexConfig((1, 3), 32, 8, 4, token=32, target=target))


@pytest.mark.parametrize("over", ["mean", "max"])
def test_targets_and_loss_are_those_of_slow_loops(index, model, over):
    ids = torch.randint(VOCABULARY, (40,))
    queries = torch.tensor([9, 25, 39])
    seen = index.model.observe(model, ids, queries, {1, 3})
    plan = DeltaConfig(page_size=4, budget_pages=5, recent_pages=2, sink_pages=1,
                       dense_layers=(0,), delta_layers=(1, 3))  # fmt: skip
    forced = index.train.forced(queries, len(ids), plan)
    made = make_index(index, over)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids[None], output_attentions=True, output_hidden_states=True)
    losses = []
    for place, group in enumerate((range(1, 3), range(3, 5))):
        layer = model.model.layers[group[0]]
        states = layer.input_layernorm(out.hidden_states[group[0]])[0].detach()
        for row, t in enumerate(queries.tolist()):
            weights = [out.attentions[i][0, :, t].detach() for i in group]
            both = torch.stack(weights)
            target = both.mean(dim=(0, 1)) if over == "mean" else both.amax(dim=(0, 1))
            torch.testing.assert_close(seen.target(group, over)[row], target)
            # One sink page, the query's own page and the one before it are forced.
            left = [s for s in range(t + 1) if s >= 4 and s // 4 < t // 4 - 1]
            assert left == [s for s in range(t + 1) if not forced[row, s]]
            query = rotated(made.query[place] @ states[t], t)
            logits = torch.stack(
                [query @ rotated(made.key[place] @ states[s], s) / 8**0.5 for s in left]
                or [torch.zeros(())]
            )
            if not left:
                losses.append(torch.zeros(()))
                continue
            p, mass = target[left] / target[left].sum(), target[left].sum()
            losses.append(mass.clamp(max=1) * (p * (p.log() - logits.log_softmax(0))).sum())
    expected = torch.stack(losses).mean()
    found = index.model.index_loss(made, seen, forced, LAYERS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def rotated(x, position):
    """The first four of eight channels, as two planes."""
    angle = position * torch.tensor([1.0, 1e5**-0.5])
    turn = torch.polar(torch.ones(2), angle)
    z = torch.complex(x[:2], x[2:4]) * turn
    return torch.cat([z.real, z.imag, x[4:]])


@pytest.mark.parametrize("pool", ["sum", "max"])
def test_selection_is_that_of_slow_loops_and_alike_in_rows_and_steps(index, model, pool):
    ids = torch.randint(VOCABULARY, (71,))
    made = make_index(index)
    reads, log_probs = {}, {}
    for way in ("rows", "steps"):
        with index.policy.known(model, {"tiny": made}):
            policy = make_policy(f"index:which=tiny:page_size=4:recent=2:pool={pool}", model, 24)
            if way == "rows":
                text = RowsText.prepare(model, ids, 60)
                log_probs[way] = text.log_probs(model, policy)
                reads[way] = policy.counts([60], 10).read
            else:
                with policy.decoding(model), torch.no_grad():
                    cache = model(ids[None, :60]).past_key_values
                    steps = [model(ids[None, t : t + 1], past_key_values=cache).logits[0, -1]
                             for t in range(60, 70)]  # fmt: skip
                log_probs[way] = torch.stack(steps).log_softmax(1)
                reads[way] = policy.counts([60], 10).read
    torch.testing.assert_close(log_probs["rows"], log_probs["steps"], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(reads["rows"], reads["steps"])
    # Layer 0 reads n, four layers six pages of which the last is held in part.
    n = np.arange(61, 71)
    np.testing.assert_allclose(reads["rows"][:, 0], (n + 4 * (24 - (-n % 4))) / 5)
    np.testing.assert_allclose(reads["rows"][:, 0], policy.expected(n.astype(float), 60))
    torch.testing.assert_close(log_probs["rows"][0], slow_step(model, made, ids[:61], pool),
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def slow_step(model, made, ids, pool):
    """Log-probabilities behind the last token, which alone reads the pages of its index."""
    t, hidden = len(ids) - 1, {}
    model.set_attn_implementation("eager")

    def allow(layer, place):
        """Restrict what the last token reads from here on."""

        def hook(module, args, kwargs):
            if place is not None:
                states = kwargs["hidden_states"][0]
                query = rotated(made.query[place] @ states[t], t)
                logits = (
                    torch.stack(
                        [query @ rotated(made.key[place] @ states[s], s) for s in range(t + 1)]
                    )
                    / 8**0.5
                )
                scores = logits.softmax(0) if pool == "sum" else logits
                best = {}
                for s in range(t + 1):
                    value = scores[s].item()
                    best[s // 4] = (
                        best.get(s // 4, 0) + value if pool == "sum"
                        else max(best.get(s // 4, -1e9), value)
                    )  # fmt: skip
                last = t // 4
                free = sorted((p for p in best if 0 < p < last - 1), key=lambda p: -best[p])
                hidden["pages"] = {0, last - 1, last, *free[:3]}
            mask = torch.full((t + 1, t + 1), -torch.inf).triu(1)
            if layer >= 1:
                for s in range(t + 1):
                    if s // 4 not in hidden["pages"]:
                        mask[t, s] = -torch.inf
            return args, {**kwargs, "attention_mask": mask[None, None]}

        return hook

    places = {1: 0, 3: 1}
    handles = [
        layer.self_attn.register_forward_pre_hook(allow(i, places.get(i)), with_kwargs=True)
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        out = model(ids[None]).logits[0, -1].log_softmax(0)
    for handle in handles:
        handle.remove()
    return out


def test_a_batch_with_padding_chooses_as_each_row_alone(index, model):
    made = make_index(index)
    rows = [torch.randint(VOCABULARY, (n,)) for n in (64, 47)]
    pad = torch.zeros(17, dtype=torch.int64)
    batch = torch.stack([rows[0], torch.cat([pad, rows[1]])])
    mask = torch.ones_like(batch)
    mask[1, :17] = 0
    with index.policy.known(model, {"tiny": made}):
        policy = make_policy("index:which=tiny:page_size=4:recent=2", model, 24)
        with policy.decoding(model):
            together = model.generate(
                batch, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
            )
            for row, ids in enumerate(rows):
                ones = torch.ones_like(ids[None])
                alone = model.generate(
                    ids[None], attention_mask=ones, max_new_tokens=6, do_sample=False,
                    pad_token_id=0,
                )  # fmt: skip
                assert together[row, -6:].tolist() == alone[0, -6:].tolist()


class Words:
    """A tokenizer of nothing."""


def test_training_lowers_the_loss_leaves_the_model_and_goes_on(index, model, tmp_path, monkeypatch):
    rows = torch.randint(VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(
        index.train, "Rows", lambda *args: type("", (), {"row": lambda self, i: rows[i % 4]})()
    )
    plan = DeltaConfig(page_size=4, budget_pages=5, recent_pages=2, sink_pages=1,
                       dense_layers=(0,), delta_layers=(1, 3))  # fmt: skip
    monkeypatch.setattr(index.train.DeltaConfig, "for_model", lambda model: plan)
    before = {name: x.clone() for name, x in model.state_dict().items()}

    def train(folder, stop=1e9):
        monkeypatch.setattr(sys, "argv", [
            "train.py", "--model=tiny", f"--workdir={folder}", "--steps=20", "--rows=2",
            "--repeats=2", "--width=8", "--rotary=4", "--queries=16", "--lr=0.02",
        ])  # fmt: skip
        folder.mkdir(exist_ok=True)
        return index.train.Training(index.train.parse(), model, Words()).train(stop)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole)
    assert not train(parts, 0) and not train(parts, 0) and train(parts)
    for name in ("one", "four", "each", "replaced"):
        one, other = (index.model.Index.load(folder / f"{name}.pt") for folder in (whole, parts))
        assert torch.equal(one.query, other.query) and torch.equal(one.key, other.key)
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert all(log[-1][name] < 0.8 * log[0][name] for name in ("one", "each", "replaced"))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    sources = {name: index.model.Index.load(whole / f"{name}.pt").config.sources
               for name in ("one", "each", "replaced")}  # fmt: skip
    assert sources == {"one": (3,), "each": (3, 4), "replaced": (1, 3)}


@pytest.mark.parametrize("file", sorted(RESULTS.glob("index-*.json")), ids=lambda path: path.name)
def test_the_page_has_the_tables_of_its_files(index, file):
    page = (TRAINING.parent / "docs" / "clsa.md").read_text(encoding="utf-8")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert file.name in page
    for line in importlib.import_module("index.page").lines(rows):
        assert line in page


def test_no_code_of_evaluations_is_trained_on(index, monkeypatch):
    monkeypatch.setattr(index.data, "read", str)
    files = index.data.code_text().split("\n\n")
    evaluated = {str(path) for path in code_files()}
    assert len(files) == len(set(files)) > 400 and not evaluated & set(files)
    folders = {folder for path in files for folder in Path(path).parts}
    assert not folders & {"test", "tests", "site-packages", "idlelib", "encodings"}
    assert "json" in folders
