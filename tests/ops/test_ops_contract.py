"""What the operations refuse, and that they say it in one line that names both sides."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch
from ops_oracle import make_case, needs_triton, pack

from deltadecode import ops
from deltadecode.config import DeltaConfig
from deltadecode.errors import OperationError
from deltadecode.ops import dispatch

INT = torch.int32


def call(case, **changes):
    names = ("q", "k_cache", "v_cache", "block_table", "seq_lens")
    arguments = dict(zip(names, case.arguments, strict=True), **case.options)
    return ops.decode_attention(**{**arguments, **changes})


@pytest.fixture
def case():
    return make_case(0, [9, 4], pages_per_block=2, poison=0.0)


def test_the_operations_are_an_attribute_of_the_package():
    code = (
        "import sys, deltadecode as dd\n"
        "assert 'ops' in dir(dd) and 'torch' not in sys.modules\n"
        "assert dd.ops.decode_attention and dd.ops.select_pages\n"
        "import torch; assert torch.zeros(1).dim() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_operation_takes_what_its_backends_take():
    parameters = inspect.signature(ops.decode_attention).parameters
    fields = dataclasses.fields(ops.DecodeInputs)
    assert list(parameters) == [*(field.name for field in fields), "backend"]
    for field in fields:
        default = parameters[field.name].default
        missing = default is inspect.Parameter.empty
        assert field.default == (dataclasses.MISSING if missing else default)


def test_auto_is_one_of_the_backends(case):
    assert torch.equal(call(case), call(case, backend="torch"))
    torch.testing.assert_close(call(case), call(case, backend="reference"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "gpu"}, ("'gpu'", "'reference'")),
        ({"page_size": 3}, ("block_size 8", "page_size 3")),
        ({"page_size": 16}, ("block_size 8", "page_size 16")),
        ({"page_size": 0}, ("block_size 8", "page_size 0")),
        ({"q": torch.zeros(2, 4)}, ("q must be", "[2, 4]")),
        ({"q": torch.zeros(2, 4, 4, dtype=torch.int8)}, ("q must be", "int8")),
        ({"q": torch.zeros(2, 3, 4)}, ("multiple of Hkv", "[2, 3, 4]", "[5, 8, 2, 4]")),
        ({"q": torch.zeros(2, 4, 8)}, ("agree in D", "[2, 4, 8]", "[5, 8, 2, 4]")),
        (
            {"q": torch.zeros(2, 4, 4).bfloat16()},
            ("must be like q, float8_e4m3fn or int8", "float32", "bfloat16"),
        ),
        ({"q": torch.zeros(2, 4, 4, device="meta")}, ("like q", "cpu", "meta")),
        ({"q": torch.zeros(3, 4, 4)}, ("block_table", "int32 [3, 3]", "[2, 3]")),
        ({"k_cache": torch.zeros(6, 8, 2, 4)}, ("k_cache and v_cache", "[6, 8", "[5, 8")),
        ({"block_table": torch.zeros(2, 2)}, ("block_table", "int32", "float32")),
        ({"block_table": torch.zeros(2, dtype=INT)}, ("block_table", "[2]")),
        ({"seq_lens": torch.zeros(2, dtype=torch.int64)}, ("seq_lens", "int32", "int64")),
        ({"seq_lens": torch.zeros(3, dtype=INT)}, ("seq_lens", "[2]", "[3]")),
        ({"seq_lens": torch.tensor([1, 25], dtype=INT)}, ("24 tokens", "25")),
        ({"sinks": torch.zeros(2)}, ("sinks", "[4]", "[2]")),
        ({"sinks": torch.zeros(4, dtype=INT)}, ("sinks", "float", "int32")),
        ({"softcap": 0.0}, ("softcap", "0.0")),
        ({"softcap": -1.0}, ("softcap", "-1.0")),
        ({"page_ids": torch.zeros(2, 1, dtype=INT)}, ("page_counts", "only one")),
        ({"page_counts": torch.zeros(2, dtype=INT)}, ("page_ids", "only one")),
        ({"seq_lens": torch.tensor([-1, 2], dtype=INT)}, ("seq_lens must not be negative", "-1")),
        *(
            ({name: [1.0]}, (f"{name} must be a tensor", "list"))
            for name in (
                "q",
                "k_cache",
                "v_cache",
                "block_table",
                "seq_lens",
                "page_ids",
                "page_counts",
                "sinks",
                "k_scales",
                "v_scales",
            )
        ),
        ({"q": None}, ("q must be a tensor", "NoneType")),
        *(
            ({name: value}, (f"{name} must be a finite number", repr(value)))
            for name in ("scale", "k_scale", "v_scale", "softcap")
            for value in ("x", float("nan"), float("inf"))
        ),
        ({"page_size": 2.0}, ("page_size must be an int", "2.0")),
        ({"page_size": None}, ("page_size must be an int", "None")),
    ],
)
def test_decode_attention_refuses(case, change, words):
    with pytest.raises(OperationError) as error:
        call(case, **change)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_caches_of_two_types_are_refused(case):
    with pytest.raises(OperationError, match=r"must have one dtype, got float8_e4m3fn.*float32"):
        call(case, k_cache=case.k_cache.to(torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "int8 caches need k_scales and v_scales, got neither"),
        ({"k_scales": torch.ones(5, 8, 2)}, "k_scales and v_scales go together"),
        ({"k_scales": torch.ones(5, 8, 2), "v_scales": torch.ones(5, 8)}, "v_scales must be a"),
        (
            {"k_scales": torch.ones(5, 8, 2), "v_scales": torch.ones(5, 2, 8).mT},
            r"must be alike, .* strides \(16, 2, 1\)",
        ),
    ],
)
def test_scales_of_tokens_that_do_not_fit_are_refused(case, change, words):
    stored = {name: getattr(case, name).to(torch.int8) for name in ("k_cache", "v_cache")}
    with pytest.raises(OperationError, match=words):
        call(case, **stored, **change)
    if len(change) == 2:
        with pytest.raises(OperationError, match="are for caches of 8 bits, got float32"):
            call(case, **change)


@needs_triton
@pytest.mark.parametrize(
    ("heads", "dim", "words"),
    [((66, 2), 4, ("up to 32 query heads per KV head", "got 33")), ((2, 2), 257, ("256", "257"))],
)
def test_triton_refuses_what_it_does_not_support(heads, dim, words):
    cache = torch.zeros(1, 4, heads[1], dim)
    q, table = torch.zeros(1, heads[0], dim), torch.zeros(1, 1, dtype=INT)
    arguments = (q, cache, cache, table, torch.ones(1, dtype=INT))
    with pytest.raises(OperationError) as error:
        ops.decode_attention(*arguments, scale=1.0, page_size=4, backend="triton")
    for word in ("backend 'triton'", *words):
        assert word in str(error.value), error.value
    # Asked for by no name, another backend takes it.
    assert ops.decode_attention(*arguments, scale=1.0, page_size=4).shape == q.shape


@needs_triton
def test_triton_refuses_tensors_on_a_cpu(case, monkeypatch):
    monkeypatch.setattr(dispatch.triton_backend(), "_INTERPRETED", False)
    with pytest.raises(OperationError, match="backend 'triton' needs CUDA tensors, got cpu"):
        call(case, backend="triton")
    with pytest.raises(OperationError, match="backend 'triton' needs CUDA tensors, got cpu"):
        ops.select_pages(
            torch.zeros(1, 3), torch.ones(1, dtype=INT), DeltaConfig(), backend="triton"
        )


@needs_triton
def test_triton_refuses_gpus_it_does_not_compile_for(case, monkeypatch):
    from deltadecode.ops.triton.launch import Hardware

    kernels = dispatch.triton_backend()
    float8 = {name: getattr(case, name).to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
    monkeypatch.setattr(kernels, "hardware", lambda device: Hardware(132, (8, 0)))
    assert call(case, backend="triton").shape == case.q.shape
    with pytest.raises(OperationError, match=r"8\.9 for float8 or more, got 8\.0"):
        call(case, backend="triton", **float8)
    monkeypatch.setattr(kernels, "hardware", lambda device: Hardware(132, (7, 5)))
    with pytest.raises(OperationError, match=r"compute capability 8\.0 or more, got 7\.5"):
        call(case, backend="triton")
    scores, lens = torch.zeros(1, 3), torch.ones(1, dtype=INT)
    with pytest.raises(OperationError, match=r"compute capability 8\.0 or more, got 7\.5"):
        ops.select_pages(scores, lens, DeltaConfig(), backend="triton")


def test_a_machine_without_triton_says_so(case, monkeypatch):
    monkeypatch.setattr(dispatch, "triton_backend", lambda: None)
    with pytest.raises(OperationError, match="needs the package triton, which is not installed"):
        call(case, backend="triton")
    assert call(case).shape == case.q.shape


def test_decode_attention_refuses_bad_pages(case):
    ids, counts = pack([[0], [0]], 3)
    assert call(case, page_ids=ids, page_counts=counts).shape == (2, 4, 4)
    with pytest.raises(OperationError, match="return_page_scores needs every token"):
        call(case, page_ids=ids, page_counts=counts, return_page_scores=True)
    with pytest.raises(OperationError, match=r"page_ids must be int32.*int64"):
        call(case, page_ids=ids.long(), page_counts=counts)
    with pytest.raises(OperationError, match=r"page_ids must be \[B, pages\].*\[2\]"):
        call(case, page_ids=counts, page_counts=counts)
    with pytest.raises(OperationError, match=r"page_counts must be int32 \[2\].*\[1\]"):
        call(case, page_ids=ids, page_counts=counts[:1])


def test_decode_attention_refuses_strided_heads(case):
    case.k_cache = case.k_cache.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(OperationError, match="k_cache must have last stride 1"):
        call(case)


@pytest.mark.parametrize(
    ("scores", "lengths", "words"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=INT), ("page_scores", "[2]")),
        (torch.zeros(2, 3, dtype=INT), torch.zeros(2, dtype=INT), ("page_scores", "int32")),
        (torch.zeros(2, 3), torch.zeros(3, dtype=INT), ("seq_lens", "[2]", "[3]")),
        (torch.zeros(2, 3), torch.zeros(2), ("seq_lens", "int32", "float32")),
        (torch.zeros(2, 3), torch.tensor([0, 49], dtype=INT), ("48 tokens", "49")),
        (torch.zeros(2, 3), torch.tensor([-1, 9], dtype=INT), ("not be negative", "-1")),
        ([1.0], torch.zeros(2, dtype=INT), ("page_scores must be a tensor", "list")),
        (torch.zeros(2, 3), 3, ("seq_lens must be a tensor", "int")),
    ],
)
def test_select_pages_refuses(scores, lengths, words):
    with pytest.raises(OperationError) as error:
        ops.select_pages(scores, lengths, DeltaConfig())
    for word in words:
        assert word in str(error.value), error.value


def test_a_plan_of_another_type_is_refused():
    with pytest.raises(OperationError, match="cfg must be a DeltaConfig, got dict"):
        ops.select_pages(torch.zeros(2, 3), torch.zeros(2, dtype=INT), {"page_size": 8})


def test_torch_backend_reads_no_memory_outside_the_cache(case):
    for block in (-1, 5):
        case.block_table[1, 0] = block
        with pytest.raises(
            OperationError, match=rf"block_table must name blocks in 0..4, got {block}"
        ):
            call(case)
