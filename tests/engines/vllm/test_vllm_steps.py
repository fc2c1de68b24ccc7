"""A layer's part in a step, with kernels in Triton's interpreter and a stand-in for the engine."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton

from deltadecode import DeltaConfig, ops
from deltadecode.engines.serving.rows import divide
from deltadecode.engines.serving.settings import ServingSettings
from deltadecode.engines.serving.step import Cache, ForwardPass, attend
from deltadecode.engines.vllm import implementation, ranks
from deltadecode.engines.vllm.implementation import DeltaImpl
from deltadecode.errors import UnsupportedModelError

CONFIG = DeltaConfig(4, 3, 1, 1, (), (0,))
SETTINGS = ServingSettings(CONFIG, CONFIG.layer_plan(2))
HEADS, KV_HEADS, DIM, BLOCK, BLOCKS = 4, 2, 16, 8, 6
STOCK = 5.0


class Stock:
    """Writes one number for every token that it is asked for."""

    def forward(self, layer, query, key, value, kv_cache, metadata, output):
        assert query.shape == output.shape
        output.fill_(STOCK)


class Impl(DeltaImpl, Stock):
    head_size, scale, logits_soft_cap, sinks = DIM, DIM**-0.5, 0.0, None

    def __init__(self, number, plans):
        self.settings, self.plans, self._longest = SETTINGS, plans, 4096
        self._most_rows, self._numbers = 0, [1]
        self._number, self._role, self._kernels = number, SETTINGS.plan.role(number), {}


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(ranks, "get_tp_group", lambda: SimpleNamespace(world_size=1))


@pytest.fixture(params=[True, False], ids=["kernels", "operations"])
def run(request, monkeypatch):
    """Run both layers over a batch; gives the outputs of every token."""
    heads = torch.zeros(1, HEADS, DIM), torch.zeros(1, BLOCK, KV_HEADS, DIM)
    if request.param and ops.kernels_refuse(*heads):
        pytest.skip("needs the interpreter")
    context = SimpleNamespace()
    monkeypatch.setattr(implementation, "get_forward_context", lambda: context)
    layers = [Impl(number, request.param) for number in range(2)]

    def run(batch):
        vars(context).clear()
        outputs = []
        for layer in layers:
            output = torch.full_like(batch.q, 7.0)
            layer.forward(None, batch.q, None, None, batch.caches[layer._number], batch, output)
            outputs.append(output)
        assert all(bool(layer._kernels) == request.param for layer in layers)
        return outputs

    return run


class Batch:
    """Metadata of a batch of rows with ``new`` tokens each, up to ``most`` of them decode rows."""

    def __init__(self, new, lengths, most=1):
        starts = torch.tensor([0, *new]).cumsum(0)
        count, tokens = len(new), sum(new)
        self.caches = torch.randn(2, count * BLOCKS, 2, BLOCK, KV_HEADS, DIM)
        self.block_table = torch.randperm(count * BLOCKS).view(count, BLOCKS).int()
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)
        self.max_seq_len = BLOCKS * BLOCK
        self.q = torch.randn(tokens, HEADS, DIM)
        rows = self.delta = divide(starts, count, tokens, max(new), most, self.q.device)
        rows.others, rows.prefill = rows.decode < count, SimpleNamespace()
        self.new, self.starts = new, starts

    def expected(self):
        """Each decode row alone."""
        outputs = [torch.full_like(self.q, STOCK) for _ in range(2)]
        for row in range(self.delta.decode):
            span = slice(self.starts[row], self.starts[row + 1])
            forward = ForwardPass()
            for layer, output in enumerate(outputs):
                cache = Cache(
                    *self.caches[layer].unbind(1), self.block_table[row : row + 1],
                    self.seq_lens[row : row + 1],
                )  # fmt: skip
                output[span] = attend(
                    SETTINGS, layer, SETTINGS.plan.role(layer), self.q[None, span], cache, forward,
                    scale=DIM**-0.5,
                )[0]  # fmt: skip
        return outputs


@pytest.mark.parametrize(
    "batch",
    [
        ([1, 1, 1], [40, 9, 33]),
        ([1, 1, 1, 5, 2], [40, 9, 33, 20, 2]),
        ([3, 3, 3, 9], [40, 9, 33, 9], 3),
        ([3, 1, 2, 9], [40, 9, 33, 9], 3),
    ],
)
def test_every_row_is_what_it_is_alone(run, batch, request):
    batch = Batch(*batch)
    if batch.delta.tokens > 1 and "kernels" in request.node.name and triton.__version__ >= "3.8":
        pytest.skip("the interpreter of this Triton refuses a mask that its compiler takes")
    for _ in range(2):
        for found, expected in zip(run(batch), batch.expected(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_prompts_are_asked_for_where_there_may_be_some(run):
    batch = Batch([1, 1], [40, 33])
    batch.delta.prompts = torch.tensor([False, True])
    full, sparse = run(batch)
    assert not torch.allclose(sparse[0], batch.expected()[1][1])
    every = Cache(*batch.caches[1].unbind(1), batch.block_table, batch.seq_lens)
    expected = attend(SETTINGS, 0, "dense", batch.q, every, ForwardPass(), scale=DIM**-0.5)
    torch.testing.assert_close(sparse[1], expected[1], rtol=1e-4, atol=1e-5)
    # In a batch that has none, flags are not looked at outside of graphs.
    batch.delta.flagged = False
    torch.testing.assert_close(run(batch)[1], batch.expected()[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(full, run(batch)[0])


def test_a_run_without_a_batch_is_stock_attention(run):
    output = torch.zeros(3, HEADS, DIM)
    Impl(0, False).forward(None, output, None, None, torch.zeros(0), None, output)
    assert (output == STOCK).all()


@pytest.mark.parametrize(("longest", "captured", "stock"), [
    (43, False, True), (44, False, False), (43, True, False),
])  # fmt: skip
def test_a_batch_below_min_tokens_is_stock_attention_outside_of_graphs(
    monkeypatch, longest, captured, stock
):
    monkeypatch.setattr(implementation, "is_captured", lambda q: captured)
    monkeypatch.setattr(implementation, "get_forward_context", SimpleNamespace)
    batch = Batch([1, 1, 5], [40, 9, 43])
    batch.max_seq_len = longest
    layer = Impl(0, plans=False)
    layer.settings = replace(SETTINGS, min_tokens=44)
    output = torch.full_like(batch.q, 7.0)
    layer.forward(None, batch.q, None, None, batch.caches[0], batch, output)
    assert (output[2:] == STOCK).all()
    assert (output[:2] == STOCK).all() == stock
    # Caches that stock attention cannot read stay with ours.
    layer.stock_reads = False
    layer.forward(None, batch.q, None, None, batch.caches[0], batch, output)
    torch.testing.assert_close(output, batch.expected()[0], rtol=1e-4, atol=1e-5)


def test_in_lossless_mode_steps_without_drafts_are_stock_attention(monkeypatch):
    monkeypatch.setattr(implementation, "get_forward_context", SimpleNamespace)
    layer = Impl(0, False)
    layer._lossless = True
    for new, stock in (([1, 1], True), ([1, 5], True), ([3, 3], False), ([1, 3], False)):
        batch = Batch(new, [40, 33], most=3)
        output = torch.zeros_like(batch.q)
        layer.forward(None, batch.q, None, None, batch.caches[0], batch, output)
        assert (output == STOCK).all() == stock


def role_of_a_layer(**values):
    """The role that a sparse layer finds, which has these values by its engine."""
    layer = Impl(1, False)
    vars(layer).update(values, _role=None)
    return layer.role(SimpleNamespace(layer_name="model.layers.1.self_attn.attn"))


# FlashAttention has the tokens before and behind; on CPUs it is the window, or -1.
@pytest.mark.parametrize(
    "special", [{"sliding_window": (15, 0)}, {"sliding_window": 16}, {"alibi_slopes": [0.5]}]
)
def test_a_planned_layer_that_hides_tokens_is_refused_where_no_configuration_says_so(special):
    with pytest.raises(UnsupportedModelError, match="layer 1 has a sliding window or ALiBi"):
        role_of_a_layer(**special)


@pytest.mark.parametrize("window", [(-1, -1), -1, (4095, 0), 4096, None])
def test_a_window_that_hides_nothing_is_none(window):
    assert role_of_a_layer(sliding_window=window) == "sparse"
