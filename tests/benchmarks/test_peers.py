"""The adapters of peers, against stand-ins with the peers' own signatures."""

import sys
import types
from itertools import pairwise

import pytest
import torch

from benchmarks.kernels.cases import Shape
from benchmarks.kernels.inputs import exact_attention, make_inputs, relative_error
from benchmarks.kernels.peers import FlashAttention3, FlashInfer, find_peers
from benchmarks.report import reason

CPU = torch.device("cpu")


def attend(q, k, v, table, lens, scale):
    """Paged attention, row by row."""
    found = []
    for row in range(q.shape[0]):
        keys, values = (c[table[row].long()].flatten(0, 1)[: lens[row]].double() for c in (k, v))
        heads = q[row].double().view(k.shape[2], -1, q.shape[2])
        weights = (torch.einsum("hgd,thd->hgt", heads, keys) * scale).softmax(-1)
        found.append(torch.einsum("hgt,thd->hgd", weights, values).reshape(q[row].shape))
    return torch.stack(found).to(q.dtype)


def flash_attn_varlen_func(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=None, softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    return_softmax_lse=False, out=None, scheduler_metadata=None, q_descale=None, k_descale=None,
    v_descale=None, num_splits=0, output_scale=None, fa_version=2, s_aux=None,
):  # fmt: skip
    """Signature of vLLM 0.24."""
    assert (fa_version, max_seqlen_q, causal, num_splits) == (3, 1, True, 32)
    assert cu_seqlens_q.tolist() == list(range(q.shape[0] + 1))
    assert seqused_k.dtype == block_table.dtype == torch.int32
    assert max_seqlen_k >= int(seqused_k.max())
    assert block_table.shape[1] * k.shape[1] >= int(seqused_k.max())
    assert torch.equal(scheduler_metadata, seqused_k)
    return out.copy_(attend(q, k, v, block_table, seqused_k, softmax_scale))


def get_scheduler_metadata(
    batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
    qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1),
    has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    """Signature of vLLM 0.24; what it gives here is only to be recognized again."""
    assert (batch_size, max_seqlen_q) == (len(cache_seqlens), 1)
    assert (num_heads_q, num_heads_kv, headdim, page_size) == (4, 2, 128, 16)
    assert (causal, num_splits, qkv_dtype) == (True, 32, torch.bfloat16)
    return cache_seqlens.clone()


class Wrapper:
    """Signature of FlashInfer 0.6."""

    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False,
        paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None, backend="auto", jit_args=None,
    ):  # fmt: skip
        assert float_workspace_buffer.eq(0).all()
        assert (kv_layout, use_cuda_graph, use_tensor_cores) == ("NHD", True, True)
        self.buffers = (
            paged_kv_indptr_buffer,
            paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer,
        )

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type="float16",
        kv_data_type=None, o_data_type=None, data_type=None, sm_scale=None,
    ):  # fmt: skip
        for buffer, value in zip(self.buffers, (indptr, indices, last_page_len), strict=True):
            assert (buffer.shape, buffer.dtype) == (value.shape, torch.int32)
            buffer.copy_(value)
        assert (num_qo_heads, num_kv_heads, head_dim, page_size) == (4, 2, 128, 16)
        assert q_data_type == kv_data_type == torch.bfloat16
        self.scale = sm_scale

    def run(self, q, paged_kv_cache, *args, out=None):
        starts, indices, last = self.buffers
        rows = [indices[a:b] for a, b in pairwise(starts)]
        lens = (starts.diff() - 1) * 16 + last
        return out.copy_(attend(q, *paged_kv_cache, rows, lens, self.scale))


@pytest.fixture
def stand_ins(monkeypatch):
    vllm, flashinfer = types.ModuleType("vllm"), types.ModuleType("flashinfer")
    vllm.vllm_flash_attn = types.SimpleNamespace(
        is_fa_version_supported=lambda version: version == 3,
        fa_version_unsupported_reason=lambda version: None,
        flash_attn_varlen_func=flash_attn_varlen_func,
        get_scheduler_metadata=get_scheduler_metadata,
    )
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    return vllm


@pytest.mark.parametrize("context", [40, 1024, 2100])
@pytest.mark.parametrize(
    ("peer", "op"), [(FlashAttention3, "dense"), (FlashAttention3, "sparse"), (FlashInfer, "dense")]
)
def test_a_peer_attends_to_the_same_tokens(stand_ins, peer, op, context):
    inputs = make_inputs(Shape(4, 2, 3, context), CPU, l2_bytes=2**21)
    adapter = peer()
    assert op in adapter.ops
    calls = adapter.calls(op, inputs)
    assert len(calls) == len(inputs.caches if op == "dense" else inputs.sparse) > 1
    exact = exact_attention(inputs, 3, sparse=op == "sparse")
    assert relative_error(calls[0](), exact) < 4e-3
    # The next input set is another one.
    assert relative_error(calls[1](), exact) > 0.1


def test_peers_that_are_there_are_found(stand_ins):
    peers, missing = find_peers()
    assert [peer.name for peer in peers] == ["FlashAttention-3", "FlashInfer"]
    assert missing == {}


def test_peers_that_do_not_run_say_why(stand_ins, monkeypatch):
    stand_ins.vllm_flash_attn.is_fa_version_supported = lambda version: False
    stand_ins.vllm_flash_attn.fa_version_unsupported_reason = lambda version: "compute capability 9"
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    peers, missing = find_peers()
    assert peers == []
    assert missing["FlashAttention-3"] == "RuntimeError: compute capability 9"
    assert "flashinfer" in missing["FlashInfer"]


def test_a_reason_is_one_line():
    assert reason(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert reason(RuntimeError()) == "RuntimeError: no message"
