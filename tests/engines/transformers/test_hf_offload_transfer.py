"""Copies between host memory and CUDA devices, with a runtime and streams that are simulated."""

import contextlib
import gc
import warnings
from mmap import PAGESIZE
from types import SimpleNamespace

import pytest
import torch
from hf_tiny import generate, make_model, make_prompt, small_config

import deltadecode as dd
from deltadecode.engines.transformers.offload_host import CudaTransfer
from deltadecode.engines.transformers.offload_layer import OffloadedLayer


class Runtime:
    """A CUDA runtime that pins so many bytes."""

    def __init__(self, most):
        self.most, self.pinned = most, {}

    def cudaHostRegister(self, address, size, flags):
        if size > self.most:
            return 1
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address):
        del self.pinned[address]


def pinning(monkeypatch, most):
    runtime = Runtime(most)
    fakes = {"cudart": lambda: runtime, "synchronize": lambda device: None}
    counts = {"is_available": lambda: False, "device_count": lambda: 1}
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(**fakes, **counts))
    return runtime


def test_memory_stays_pinned_as_long_as_it_is_used(monkeypatch) -> None:
    runtime = pinning(monkeypatch, PAGESIZE)
    tensor = CudaTransfer().allocate((10, 10), torch.float32)
    view, address = tensor[2:], tensor.data_ptr()
    del tensor
    gc.collect()
    # Whole pages, which no other memory shares.
    assert runtime.pinned == {address: PAGESIZE}
    assert not address % PAGESIZE
    del view
    gc.collect()
    assert runtime.pinned == {}


def test_memory_that_cannot_be_pinned_gives_one_warning(monkeypatch) -> None:
    runtime = pinning(monkeypatch, 399)
    transfer = CudaTransfer()
    with pytest.warns(UserWarning, match="refused to pin 400 bytes"):
        assert transfer.allocate((10, 10), torch.float32).shape == (10, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transfer.allocate((10, 10), torch.float32)
    assert not transfer.pinned
    assert runtime.pinned == {}


class Stream:
    """A stream that writes down what it waits for."""

    def __init__(self, log, name="copies"):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event.name))

    def synchronize(self):
        self.log.append((self.name, "is waited for"))


class Event:
    """An event that knows the last stream that recorded it."""

    def __init__(self, log):
        log.append(MADE)

    def record(self, stream):
        self.name = f"an event of {stream.name}"


ENTERED, LEFT = ("copies", "is current"), ("copies", "is left")
BEHIND, DONE = ("copies", "waits for", "model"), ("copies", "is waited for")
MADE, FETCHED = ("an event", "is made"), ("model", "waits for", "an event of copies")


@pytest.fixture
def log(monkeypatch):
    """What streams do, which play no part on a CPU: there copies are done at once."""
    log: list[tuple[str, ...]] = []
    runtime = pinning(monkeypatch, 1 << 30)

    @contextlib.contextmanager
    def current(stream):
        log.append(ENTERED)
        yield
        log.append(LEFT)

    streams = {
        "Stream": lambda device: Stream(log),
        "Event": lambda: Event(log),
        "current_stream": lambda device: Stream(log, "model"),
        "stream": current,
        "device_of": lambda tensor: contextlib.nullcontext(),
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
    }
    for name, fake in streams.items():
        setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(CudaTransfer, "check", lambda self, device: None)
    make_pool = OffloadedLayer._make_pool

    def made_for_the_model(layer):
        assert log.count(ENTERED) == log.count(LEFT), "a pool belongs to the stream of copies"
        make_pool(layer)

    monkeypatch.setattr(OffloadedLayer, "_make_pool", made_for_the_model)
    yield log
    gc.collect()
    assert runtime.pinned == {}


@pytest.fixture
def written(monkeypatch):
    """Slot and rows of each token that the kernel writes."""
    kernel = pytest.importorskip("deltadecode.engines.transformers.offload_kernel")
    append, written = kernel.append_token, []

    def noted(host, token, pool, request, key, value):
        written.append((token, request.row_numbers.tolist()))
        append(host, token, pool, request, key, value)

    monkeypatch.setattr(kernel, "append_token", noted)
    return written


@pytest.fixture
def model():
    model = make_model("llama", "sdpa")
    dd.enable(model, small_config())
    return model


def two(model, gather=True, **options):
    transfer = CudaTransfer(gather)
    ours = dd.DeltaOffloadedCache(model.config, small_config(), transfer=transfer, **options)
    return ours, dd.DeltaCache(model.config, **options)


def assert_same(model, caches, prompt, tokens, **options):
    """Both give the same bits, and hold them; gives the tokens."""
    ours, plain = (
        generate(model, prompt, tokens, past_key_values=cache, **options) for cache in caches
    )
    assert torch.equal(torch.stack(ours.logits), torch.stack(plain.logits))
    for left, right in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(left.keys, right.keys)
        assert torch.equal(left.values, right.values)
    return ours.sequences


@pytest.mark.parametrize("gather", [True, False])
def test_what_the_streams_of_a_step_wait_for(model, log, gather) -> None:
    if gather:
        pytest.importorskip("triton")
    assert_same(model, two(model, gather), make_prompt(41), 3)
    # Without the kernel the CPU waits at each fetch for what is stored.
    assert log.count(DONE) == (0 if gather else 2 * 3)
    # A prompt of three layers, then two Δ-layers in each of two steps.
    assert [line for line in log if line != DONE] == [
        *[BEHIND, ENTERED, LEFT] * 3,
        *[BEHIND, ENTERED, MADE, LEFT, FETCHED],
        *[BEHIND, ENTERED, MADE, MADE, LEFT, FETCHED, FETCHED],
        *[BEHIND, ENTERED, LEFT, FETCHED],
        *[BEHIND, ENTERED, LEFT, FETCHED, FETCHED],
    ]


# Twenty tokens are within the budget, so that 19 move out when the second one is decoded.
@pytest.mark.parametrize(
    ("lengths", "kv_dtype"), [((41,), None), ((41,), "int8"), ((19, 19), None), ((30, 9, 41), None)]
)
def test_new_tokens_are_written_by_the_kernel(model, log, written, lengths, kv_dtype) -> None:
    longest, rows = max(lengths), len(lengths)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    caches = two(model, kv_dtype=kv_dtype)
    assert_same(model, caches, make_prompt(longest, rows) * mask, 9, attention_mask=mask)
    found: dict[int, list[int]] = {}
    for token, numbers in written:
        found.setdefault(token, []).extend(numbers)
    # All rows once in each of the three sparse layers.
    assert sorted(found) == list(range(max(longest, 20), longest + 8))
    assert all(sorted(numbers) == sorted([*range(rows)] * 3) for numbers in found.values())


def test_a_step_of_full_attention_writes_its_token_too(model, log, written) -> None:
    caches = two(model)
    tokens = assert_same(model, caches, make_prompt(41, 2), 3)
    steps = len(written)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    with torch.no_grad():
        for cache in caches:
            torch.manual_seed(0)
            model(tokens[:, -1:], past_key_values=cache)
    assert len(written) == steps > 0
    model.eval()
    assert_same(model, caches, torch.cat([tokens, make_prompt(1, 2)], dim=1), 4)


def test_a_step_after_one_that_broke_off_reads_its_own_requests(model, monkeypatch) -> None:
    ours = two(model)[0]
    settled = []
    monkeypatch.setattr(CudaTransfer, "settle", lambda self: settled.append(True))
    layer = ours.layers[2]
    for place in (0, 1):
        layer.expect(place, f"of group {place}", 10, 4)
    assert not settled
    layer.expect(0, "of all rows", 10, 4)
    # The copies of that step may still read what it requested.
    assert settled
    assert layer._requests == {0: "of all rows"}
