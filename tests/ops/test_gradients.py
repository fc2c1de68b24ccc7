"""Gradients of the operations: those of plain float64 attention, or a refusal in one line."""

import pytest
import torch
from ops_oracle import make_case, needs_triton, pack

from deltadecode import ops
from deltadecode.config import DeltaConfig
from deltadecode.errors import DeltaDecodeError

LENGTHS = [21, 6, 0, 21]
PAGES = [[0, 2, 5], [1], [], [3, 5]]
KINDS = ["full", "scores", "sparse"]
LEAVES = ("q", "k_cache", "v_cache", "sinks")


def draw(layout="paged", dtype=torch.float64, rows=4, **options):
    case = make_case(3, LENGTHS[:rows], pages_per_block=2, layout=layout, dtype=dtype, **options)
    for name in LEAVES:
        if getattr(case, name) is not None:
            setattr(case, name, getattr(case, name).detach().requires_grad_())
    return case


def loss_of(out, scores):
    """One number in which each of the results has its own share."""
    loss = (out.double() * torch.arange(1.0, out.numel() + 1).view(out.shape).sin()).sum()
    if scores is not None:
        share = torch.arange(1.0, scores.numel() + 1).view(scores.shape).cos()
        loss = loss + (scores.double() * share).sum()
    return loss


def run(case, kind, backend):
    more = {"return_page_scores": True} if kind == "scores" else {}
    if kind == "sparse":
        ids, counts = pack(PAGES[: len(case.keys)], 3)
        more = {"page_ids": ids, "page_counts": counts}
    found = ops.decode_attention(*case.arguments, **case.options, **more, backend=backend)
    return found if kind == "scores" else (found, None)


def plain(case, kind):
    """The same by whole-matrix float64 attention, row by row, from nothing of ours."""
    q, k_cache, v_cache = (t.double() for t in (case.q, case.k_cache, case.v_cache))
    group = q.shape[1] // k_cache.shape[2]
    outs, scores = [], []
    for row, keys in enumerate(case.keys):
        tokens = [
            t for t in range(len(keys)) if kind != "sparse" or t // case.page_size in PAGES[row]
        ]
        score = torch.zeros(case.pages, dtype=torch.float64)
        if not tokens:
            outs.append(torch.zeros_like(q[row]))
            scores.append(score)
            continue
        at = [case.slot(row, t) for t in tokens]
        k = torch.stack([k_cache[block, slot] for block, slot in at], dim=1)
        v = torch.stack([v_cache[block, slot] for block, slot in at], dim=1)
        k, v = (t.repeat_interleave(group, dim=0) for t in (k, v))
        logits = (k @ q[row][:, :, None])[:, :, 0] * case.scale
        if case.softcap is not None:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        if case.sinks is not None:
            logits = torch.cat([logits, case.sinks.double()[:, None]], dim=1)
        alpha = logits.softmax(dim=1)[:, : len(tokens)]
        outs.append((alpha[:, None] @ v)[:, 0])
        page = torch.tensor(tokens) // case.page_size
        scores.append(score.index_add(0, page, alpha.amax(dim=0)))
    return torch.stack(outs), torch.stack(scores) if kind == "scores" else None


def gradients(case, results):
    leaves = [getattr(case, name) for name in LEAVES if getattr(case, name) is not None]
    return torch.autograd.grad(loss_of(*results), leaves)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["paged", "heads", "rows"])
@pytest.mark.parametrize(("sinks", "softcap"), [(False, None), (True, None), (True, 0.7)])
def test_gradients_are_those_of_plain_attention(backend, kind, layout, sinks, softcap):
    case = draw(layout, sinks=sinks, softcap=softcap)
    expected = gradients(case, plain(case, kind))
    for got, want in zip(gradients(case, run(case, kind, backend)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_in_the_types_of_models(backend, dtype, rows):
    """A single KV head too: one row of it goes another way."""
    for options in ({"kv_heads": 1, "group": 2}, {"softcap": 1.5, "sinks": True}):
        for kind in KINDS:
            case = draw("heads", dtype, rows, **options)
            expected = gradients(case, plain(case, kind))
            got = gradients(case, run(case, kind, backend))
            tolerance = 1e-4 if dtype == torch.float32 else 5e-2
            for ours, want in zip(got, expected, strict=True):
                assert ours.dtype == want.dtype
                torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("leaf", LEAVES)
def test_soft_capped_attention_has_gradients_of_each_input(leaf):
    case = draw(sinks=True, softcap=2.0)
    for name in set(LEAVES) - {leaf}:
        setattr(case, name, getattr(case, name).detach())
    leaf = getattr(case, leaf)
    [got] = torch.autograd.grad(loss_of(*run(case, "full", "torch")), leaf)
    [want] = torch.autograd.grad(loss_of(*plain(case, "full")), leaf)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_refuses_to_drop_gradients(kind, leaf):
    case = draw(dtype=torch.float32, sinks=True)
    for name in set(LEAVES) - {leaf}:
        setattr(case, name, getattr(case, name).detach())
    with pytest.raises(DeltaDecodeError, match="'triton' computes no gradients") as error:
        run(case, kind, "triton")
    assert "\n" not in str(error.value)
    with torch.no_grad():
        without, _ = run(case, kind, "triton")
    torch.testing.assert_close(without, run(case, kind, "torch")[0].detach(), rtol=1e-4, atol=1e-5)


@needs_triton
def test_auto_takes_a_backend_that_has_gradients(monkeypatch):
    """As on a GPU, where the kernels come first."""
    from deltadecode.ops import dispatch

    case = draw(dtype=torch.float32)
    monkeypatch.setattr(dispatch, "_choose", lambda *_: dispatch.triton_backend())
    got = gradients(case, run(case, "full", "auto"))
    for ours, want in zip(got, gradients(case, plain(case, "full")), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_graph_refuses_gradients_and_a_graph_break_has_them():
    case = draw()

    def attend(q):
        arguments = (q, *case.arguments[1:])
        return ops.decode_attention(*arguments, **case.options)

    strict = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="no gradients inside a compiled graph"):
        strict(case.q)
    with torch.no_grad():
        assert torch.equal(strict(case.q), attend(case.q))
    torch._dynamo.reset()
    broken = torch.compile(attend, backend="eager")
    [got] = torch.autograd.grad(loss_of(broken(case.q), None), case.q)
    [want] = torch.autograd.grad(loss_of(*plain(case, "full")), case.q)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_registered_operator_refuses_gradients():
    case = draw()
    operator = torch.ops.deltadecode.decode_attention
    options = (0.5, 4, None, None, None, None, 1.0, 1.0, False, False, None, None)
    arguments = (*case.arguments, *options, "torch")
    with pytest.raises(DeltaDecodeError, match="no gradients inside a compiled graph"):
        operator(*arguments)
    with torch.no_grad():
        assert operator(*arguments)[0].shape == case.q.shape


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_selection_has_none_to_drop(backend):
    scores = torch.rand(2, 9, requires_grad=True)
    lens = torch.tensor([33, 5], dtype=torch.int32)
    cfg = DeltaConfig(page_size=4, budget_pages=3, recent_pages=1)
    ids, counts = ops.select_pages(scores, lens, cfg, backend=backend)
    assert not ids.requires_grad and not counts.requires_grad
