"""Rows are grouped by where their tokens lie, and shown to the operations without a copy."""

import pytest
import torch
from hf_tiny import make_model
from transformers.masking_utils import sdpa_mask

from deltadecode.engines.transformers.full import blockwise_attention, full_attention
from deltadecode.engines.transformers.layers import DeltaLayer
from deltadecode.engines.transformers.rows import group_rows


def mask_of(*rows: str) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])[:, None, None]


def test_no_mask_is_one_group() -> None:
    (group,) = group_rows(None, torch.zeros(3, 2, 7, 4))
    assert group.rows is None
    assert group.slots is None
    assert (group.offset, group.length) == (0, 7)
    assert group.block_table.tolist() == [[0], [1], [2]]
    assert group.seq_lens.tolist() == [7, 7, 7]
    assert group.block_table.dtype == group.seq_lens.dtype == torch.int32


def test_rows_of_equal_padding_share_a_group_and_gaps_are_taken_out() -> None:
    mask = mask_of("..xxx", ".xxxx", "..xxx", "xx.xx", ".....", "xxx..")
    groups = group_rows(mask, torch.zeros(6, 2, 5, 4))
    found = {tuple(g.members): (g.offset, g.length) for g in groups}
    assert found == {(0, 2): (2, 3), (1,): (1, 4), (3,): (0, 4), (4,): (0, 0), (5,): (0, 3)}
    slots = {g.members[0]: g.slots.tolist() for g in groups if g.slots is not None}
    assert slots == {3: [0, 1, 3, 4], 4: [], 5: [0, 1, 2]}
    assert {tuple(g.members): g.block_table.tolist() for g in groups}[0, 2] == [[0], [2]]


def test_one_mask_row_for_all_rows() -> None:
    (group,) = group_rows(mask_of(".xx"), torch.zeros(4, 2, 3, 4))
    assert (group.rows, group.offset, group.length) == (None, 1, 2)


@pytest.mark.parametrize("page", [1, 3, 4, 16])
@pytest.mark.parametrize("offset", [0, 5])
def test_blocks_are_views_of_the_cache(page: int, offset: int) -> None:
    layer = DeltaLayer()
    keys, _ = layer.update(torch.randn(3, 2, 30, 4), torch.randn(3, 2, 30, 4))
    mask = mask_of("." * offset + "x" * (30 - offset))
    (group,) = group_rows(mask, keys)
    blocks = group.blocks(keys, page)
    assert blocks.shape == (3, -(-(30 - offset) // page) * page, 2, 4)
    assert blocks.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
    assert torch.equal(blocks[:, : 30 - offset].transpose(1, 2), keys[:, :, offset:])


def test_blocks_of_other_tensors_are_copied_when_their_memory_ends_early() -> None:
    keys = torch.randn(2, 3, 30, 4)
    (group,) = group_rows(None, keys)
    blocks = group.blocks(keys, 16)
    assert blocks.shape == (2, 32, 3, 4)
    assert torch.equal(blocks[:, :30].transpose(1, 2), keys)
    same = group.blocks(keys, 15)
    assert same.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
    turned = torch.randn(2, 3, 4, 30).transpose(2, 3)
    assert torch.equal(group.blocks(turned, 15).transpose(1, 2), turned)


def test_blocks_of_a_row_with_gaps() -> None:
    keys = torch.randn(2, 3, 5, 4)
    groups = group_rows(mask_of("xxxxx", "x.x.x"), keys)
    (gaps,) = (g for g in groups if g.slots is not None)
    blocks = gaps.blocks(keys, 2)
    assert blocks.shape == (1, 4, 3, 4)
    assert torch.equal(blocks[0, :3].transpose(0, 1), keys[1, :, ::2])


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention with loops over rows, heads and queries, in float64."""
    out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv = h // (q.shape[1] // k.shape[1])
            for t in range(q.shape[2]):
                logit = k[b, kv].double() @ q[b, h, t].double() * 0.3
                if softcap is not None:
                    logit = softcap * torch.tanh(logit / softcap)
                power = logit[visible[b, t]].exp()
                below = power.sum() + (0 if sinks is None else sinks[h].double().exp())
                out[b, t, h] = (power / below) @ v[b, kv][visible[b, t]].double()
    return out


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -2.0, 3.0, 0.0])])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kind", ["causal", "boolean", "additive"])
@pytest.mark.parametrize("memory", [2**26, 1])  # one query at a time, or all
def test_blockwise_attention(
    sinks: torch.Tensor | None,
    softcap: float | None,
    kind: str,
    memory: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deltadecode.engines.transformers import full

    monkeypatch.setattr(full, "_SCORE_BYTES", memory)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    visible = torch.arange(9) <= torch.arange(4, 9)[:, None]
    visible = visible.expand(2, 5, 9).clone()
    mask = None
    if kind != "causal":
        visible[1, :, :3] = False
        mask = visible[:, None]
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    got = blockwise_attention(q, k, v, mask, scale=0.3, causal=True, sinks=sinks, softcap=softcap)
    assert got.is_contiguous()
    expected = plain(q, k, v, visible, sinks, softcap)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing_gets_a_finite_output() -> None:
    q = torch.randn(1, 2, 3, 8)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    for sinks in (None, torch.zeros(2)):
        got = blockwise_attention(q, q, q, mask, scale=1.0, causal=True, sinks=sinks, softcap=2.0)
        assert got.isfinite().all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows"), [(4, 2, 3), (6, 1, 1), (3, 1, 1), (4, 4, 2)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_one_query_per_row_on_a_cpu_equals_stock(
    heads: int, kv_heads: int, rows: int, masked: bool
) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = make_model("llama", "sdpa").model.layers[0].self_attn
    module.num_key_value_groups = heads // kv_heads
    q = torch.randn(rows, heads, 1, 8)
    k, v = torch.randn(rows, kv_heads, 11, 8), torch.randn(rows, kv_heads, 11, 8)
    padding = torch.ones(rows, 11, dtype=torch.bool)
    padding[0, :4] = False
    mask = sdpa_mask(rows, 1, 11, q_offset=10, attention_mask=padding) if masked else None
    masks = [mask]
    if masked:
        masks.append(torch.randn(rows, heads, 1, 11))
    for mask in masks:
        expected, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=0.3)
        got = full_attention(module, q, k, v, mask, dropout=0.0, scaling=0.3)
        torch.testing.assert_close(got, expected)
