"""The planned kernels of a layer give what the operations give, in place."""

import sys
from dataclasses import dataclass, replace

import pytest
import torch

from deltadecode import DeltaConfig, DeltaConfigError, ops
from deltadecode.engines.serving import drafting
from deltadecode.engines.serving import kernels as module
from deltadecode.engines.serving.drafting import DraftPages
from deltadecode.engines.serving.kernels import LayerKernels
from deltadecode.engines.serving.settings import ServingSettings
from deltadecode.engines.serving.step import Cache, ForwardPass, attend

plans = pytest.importorskip("deltadecode.ops.triton.plans")

CONFIG = DeltaConfig(
    page_size=4, budget_pages=3, recent_pages=1, dense_layers=(0,), delta_layers=(1,)
)
SETTINGS = ServingSettings(CONFIG, CONFIG.layer_plan(3))
HEADS, KV_HEADS, DIM, BLOCK, BLOCKS = 4, 2, 16, 8, 6
SCALE = DIM**-0.5


def views(cache):
    return cache.unbind(1)


@dataclass
class Step:
    """One step of some rows, and each layer's cache."""

    lengths: list
    blocks: int = BLOCKS
    tokens: int = 0  # of a verify row

    def __post_init__(self):
        rows = len(self.lengths)
        self.caches = [torch.randn(rows * self.blocks, 2, BLOCK, KV_HEADS, DIM) for _ in range(3)]
        table = torch.randperm(rows * self.blocks).view(rows, self.blocks).int()
        self.table, self.lens = table, torch.tensor(self.lengths, dtype=torch.int32)
        # As an engine hands them on: a part of one projection.
        self.q = torch.randn(3, (rows + 1) * max(self.tokens, 1), HEADS + 2, DIM)[:, :, 1:-1]
        self.q = self.q[:, : rows * max(self.tokens, 1)]
        if self.tokens:
            self.q = self.q.unflatten(1, (rows, self.tokens))
        self.forward = ForwardPass()

    def expected(self, layer, **more):
        """What the operations give, of this layer and those before."""
        forward = ForwardPass()
        for number in range(1, layer + 1):
            out = attend(
                SETTINGS, number, SETTINGS.plan.role(number), self.q[number],
                Cache(*views(self.caches[number]), self.table, self.lens), forward,
                scale=SCALE, **more,
            )  # fmt: skip
        return out, forward.selections

    def run(self, planned, layer, prompts=None, idle=None):
        shape = self.q[layer].shape
        out = torch.full((len(self.lengths) + 2, *shape[1:]), 7.0)
        done = planned[layer].attend(
            self.q[layer], self.caches[layer], self.table, self.lens, self.forward, prompts, idle,
            out[: len(self.lengths)],
        )  # fmt: skip
        assert done and (out[len(self.lengths) :] == 7).all()
        return out[: len(self.lengths)]


@pytest.fixture
def planned(monkeypatch):
    pytest.importorskip("triton")
    if ops.kernels_refuse(torch.zeros(1, HEADS, DIM), torch.zeros(1, BLOCK, KV_HEADS, DIM)):
        pytest.skip("needs the interpreter")
    counted = []

    def counting(*args):
        counted.append(args)
        return ops.plan_decode(*args)

    monkeypatch.setattr(module, "plan_decode", counting)
    layers = {
        layer: LayerKernels(SETTINGS, layer, SETTINGS.plan.role(layer), views, scale=SCALE)
        for layer in (1, 2)
    }
    layers["counted"] = counted
    return layers


def check(step, planned, **more):
    for layer in (1, 2):
        out, selections = step.expected(layer, **more)
        torch.testing.assert_close(step.run(planned, layer, **more), out, rtol=1e-4, atol=1e-5)
        for kept, expected in zip(step.forward.selections[1], selections[1], strict=True):
            assert torch.equal(kept, expected)


def test_layers_are_what_the_operations_are(planned):
    check(Step([40, 9, 1]), planned)


def test_a_plan_is_made_once_for_a_shape(planned):
    check(Step([40, 9, 1]), planned)
    check(Step([3, 45, 12]), planned)
    assert len(planned["counted"]) == 2
    # Another number of rows, or another width of the table, has its own.
    check(Step([40, 9]), planned)
    check(Step([40, 9, 1], blocks=5), planned)
    assert len(planned["counted"]) == 6


def test_padding_rows_and_rows_of_prompts(planned):
    prompts = torch.tensor([False, True, False, False, True])
    step = Step([40, 30, 0, 17])
    check(step, planned, prompts=prompts)
    assert step.forward.selections[1][1].tolist() == [3, -1, 0, 3]


def test_rows_below_min_tokens(planned, monkeypatch):
    given = replace(SETTINGS, min_tokens=31)
    monkeypatch.setattr(sys.modules[__name__], "SETTINGS", given)
    for layer in (1, 2):
        monkeypatch.setattr(planned[layer], "_settings", given)
    step = Step([40, 30, 0, 31])
    check(step, planned)
    assert step.forward.selections[1][1].tolist() == [3, -1, 0, 3]


def test_rows_of_drafts(planned):
    idle = torch.tensor([[False, False], [True, False], [True, True]])
    check(Step([40, 9, 0], tokens=2), planned)
    check(
        Step([3, 45, 0], tokens=2), planned, idle=idle, prompts=torch.tensor([True, False, False])
    )
    assert len(planned["counted"]) == 2


@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("float8_q", [False, True])
def test_float8_caches_with_scales(planned, float8_q, tokens):
    """As if what their numbers stand for was in caches, and in queries, of the output's type."""
    scales = {"q_scale": 0.05, "k_scale": 0.7, "v_scale": 1.3}
    step = Step([40, 9, 1], tokens=tokens)
    float8 = [cache.to(torch.float8_e4m3fn) for cache in step.caches]
    q = step.q
    if float8_q:
        q = (q / 0.05).to(torch.float8_e4m3fn)
        step.q = q.float() * 0.05
    for cache, rounded in zip(step.caches, float8, strict=True):
        factors = torch.tensor([0.7, 1.3])[:, None, None, None]
        cache.copy_(rounded.float() * factors)
    expected = {layer: step.expected(layer) for layer in (1, 2)}
    step.q, step.caches = q, float8
    for layer in (1, 2):
        planned[layer] = LayerKernels(
            SETTINGS, layer, SETTINGS.plan.role(layer), views, scale=SCALE, **scales
        )
        out, selections = expected[layer]
        torch.testing.assert_close(step.run(planned, layer), out, rtol=1e-4, atol=1e-5)
        for kept, selected in zip(step.forward.selections[1], selections[1], strict=True):
            assert torch.equal(kept, selected)


def test_a_sparse_layer_needs_its_delta_layer(planned):
    with pytest.raises(DeltaConfigError, match="sparse layer 2 needs Δ-layer 1 before it"):
        Step([5]).run(planned, 2)
    step = Step([5])
    check(step, planned)
    step.forward = ForwardPass()
    with pytest.raises(DeltaConfigError, match="sparse layer 2 needs Δ-layer 1 before it"):
        step.run(planned, 2)


@pytest.mark.parametrize("tokens", [0, 2])
def test_ranks_that_select_together_keep_the_pages_of_all_heads(planned, tokens):
    step = Step([40, 37, 48, 9], tokens=tokens)
    _, expected = step.expected(1)
    q, cache, forward = step.q[1], step.caches[1], step.forward
    synced = replace(SETTINGS, sync_heads=True)
    alone = []
    for heads, kv_head in ((slice(0, 2), 0), (slice(2, 4), 1)):
        rest = slice(2, 4) if heads.start == 0 else slice(0, 2)

        def both(scores, rest=rest, kv_head=1 - kv_head):
            k_cache, v_cache = (each[:, :, kv_head : kv_head + 1] for each in views(cache))
            _, others = ops.decode_attention(
                q[..., rest, :], k_cache, v_cache, step.table, step.lens, scale=SCALE,
                page_size=1, return_page_scores=True,
            )  # fmt: skip
            return scores.copy_(torch.maximum(scores, others.flatten()))

        part, own = q[..., heads, :], cache[..., kv_head : kv_head + 1, :]
        for settings, callback in ((synced, both), (SETTINGS, both), (synced, None)):
            kernels = LayerKernels(
                settings, 1, "delta", views, scale=SCALE, over_all_ranks=callback
            )
            out = torch.empty(part.shape)
            assert kernels.attend(part, own, step.table, step.lens, forward, None, None, out)
            torch.testing.assert_close(out, step.expected(1)[0][..., heads, :])
            pairs = zip(forward.selections[1], expected[1], strict=True)
            kept = [torch.equal(mine, all_heads) for mine, all_heads in pairs]
            if settings.sync_heads and callback:
                assert all(kept)
            else:
                alone.append(kept[0])
    assert not all(alone), "one rank's heads have to want other pages, or this test shows nothing"


@pytest.mark.parametrize("layers_at_once", [1, 9])
@pytest.mark.parametrize("tokens", [2, 5])
def test_rule12_layers_of_lossless_mode_select_together(
    planned, monkeypatch, tokens, layers_at_once
):
    monkeypatch.setattr(drafting, "_SCORES", layers_at_once * 3 * BLOCKS * BLOCK // 4)
    step = Step([40, 9, 48], tokens=tokens)
    pages = DraftPages(CONFIG, 3, 4, 4, BLOCKS * BLOCK, torch.device("cpu"))
    wanted = []
    for layer in range(3):
        kernels = LayerKernels(SETTINGS, layer, "delta", views, scale=SCALE, score_last=True)
        out, forward = torch.empty_like(step.q[layer]), ForwardPass()
        done = kernels.attend(
            step.q[layer], step.caches[layer], step.table, step.lens, step.forward, None, None, out,
            pages.layer(layer),
        )  # fmt: skip
        expected = attend(
            SETTINGS, layer, "delta", step.q[layer],
            Cache(*views(step.caches[layer]), step.table, step.lens), forward, scale=SCALE,
            score_last=True,
        )  # fmt: skip
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert done and not step.forward.selections
        last = layers_at_once == 1 or layer == 2
        assert (step.forward.waiting is None) == last
        wanted.append(forward.selections[layer][0])
    assert torch.equal(pages._selected[:, :3], torch.stack(wanted))
    assert (pages._lengths[:, :3] == step.lens).all()


def test_where_the_kernels_do_not_compute_nothing_is_done(planned):
    step = Step([5])
    out = torch.full((1, DIM, HEADS), 7.0).transpose(1, 2)
    done = planned[1].attend(
        step.q[1], step.caches[1], step.table, step.lens, step.forward, None, None, out
    )
    assert not done and (out == 7).all() and not step.forward.selections


@pytest.mark.parametrize("layer", [1, 2])
def test_what_is_compiled_ahead_is_planned_like_a_step(planned, layer):
    """Once, for rows of one new token and of drafts; longer tables than that make other plans."""
    step = Step([40, 9], tokens=3)
    kernels = LayerKernels(
        SETTINGS, layer, SETTINGS.plan.role(layer), views, scale=SCALE, rows=5, tokens=(1, 3)
    )
    for _ in range(2):
        kernels.compile_ahead(
            step.q[layer].flatten(0, 1), step.caches[layer], BLOCKS * BLOCK - 1, torch.float32
        )
    found = {inputs.q.shape: inputs for inputs, *_ in planned["counted"]}
    assert set(found) == {(1, HEADS, DIM), (1, 3, HEADS, DIM)} and len(planned["counted"]) == 2
    assert all(rows == 5 for _, _, rows, *_ in planned["counted"])
    for lengths, tokens in (([7], 0), ([40], 3)):
        step = Step(lengths, tokens=tokens)
        for number in range(1, layer + 1):
            step.run(planned, number)
        real, ahead = planned["counted"][-1][0], found[step.q[layer].shape]
        assert plans.attention_kind(real)._replace(q_strides=()) == plans.attention_kind(
            ahead
        )._replace(q_strides=())
