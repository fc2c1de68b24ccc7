"""Host memory of an offloaded cache: how much is taken, and what is refused before it is taken."""

import copy
import pickle
import weakref

import pytest
import torch
from hf_tiny import make_model, make_prompt, small_config
from transformers.generation.streamers import BaseStreamer

import deltadecode as dd
from deltadecode.engines.transformers import offload, offload_room
from deltadecode.engines.transformers.offload_host import Transfer

OF_SLOT = 2 * 2 * 8 * 4  # bytes of keys and values in one layer
GREEDY = {"do_sample": False}


class Host(Transfer):
    """Host memory of a limited size, of which every tensor counts until it is freed."""

    def __init__(self) -> None:
        self.size = 2**40
        self.held = self.most = self.taken = self.times = 0

    @property
    def free(self) -> int:
        return self.size - self.held

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = super().allocate(shape, dtype)
        self.times += 1
        self.taken += memory.nbytes
        self.held += memory.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(memory.untyped_storage(), self._freed, memory.nbytes)
        return memory

    def _freed(self, count: int) -> None:
        self.held -= count


@pytest.fixture
def host(monkeypatch):
    host = Host()
    monkeypatch.setattr(offload_room, "free_host_bytes", lambda: host.free)
    return host


@pytest.fixture
def model():
    model = make_model("llama", "sdpa")
    model.config.max_position_embeddings = 20000
    dd.enable(model, small_config())
    return model


@pytest.fixture
def cache(model, host):
    return dd.DeltaOffloadedCache(model.config, small_config(), transfer=host)


def lengths(cache):
    return [layer.get_seq_length() for layer in cache.layers]


def refuses(model, match, prompt, **options):
    with pytest.raises(dd.UnsupportedCacheError, match=match):
        model.generate(prompt, **{**GREEDY, **options})


def test_a_prompt_in_chunks_is_refused_before_the_first(model, cache, host) -> None:
    host.size = 3 * (3000 + 1024) * OF_SLOT - 1
    match = f"need {host.size + 1:,} more bytes of host memory for 3,002 tokens"
    refuses(
        model, match, make_prompt(3000),
        past_key_values=cache, max_new_tokens=3, prefill_chunk_size=500,
    )  # fmt: skip
    assert lengths(cache) == [0] * 6
    assert host.times == 0


def test_new_tokens_behind_a_cache_are_refused_before_the_prompt(model, cache, host) -> None:
    tokens = model.generate(
        make_prompt(50), past_key_values=cache, max_new_tokens=3, **GREEDY
    )  # 52 tokens are stored, in memory for 1,074
    host.size = host.held
    refuses(
        model, "for 1,075 tokens, got 0 free", tokens, past_key_values=cache, max_new_tokens=1023
    )
    assert lengths(cache) == [52] * 6
    longer = torch.cat([tokens, make_prompt(1021)], dim=1)
    model.generate(longer, past_key_values=cache, max_new_tokens=1, **GREEDY)
    assert lengths(cache) == [1074] * 6


def test_a_step_that_finds_no_room_changes_no_layer(model, cache, host) -> None:
    plain = dd.DeltaCache(model.config)
    with torch.no_grad():
        for held in (cache, plain):
            model(make_prompt(1060), past_key_values=held)  # memory for 1,060 + 1,024 each
            model(make_prompt(1023), past_key_values=held)
            model(make_prompt(1), past_key_values=held)
        # For one layer there would be room, for all three there is not.
        host.size = host.held + 3200 * OF_SLOT
        with pytest.raises(dd.UnsupportedCacheError, match="for 2,085 tokens"):
            model(make_prompt(1), past_key_values=cache)
        assert lengths(cache) == [2084] * 6
        host.size = 2**40
        for seed in range(3):
            token = make_prompt(1, seed=seed)
            ours, wanted = (model(token, past_key_values=held).logits for held in (cache, plain))
            assert torch.equal(ours, wanted)


def generate_by_itself(model, host, monkeypatch, prompt, **options):
    """Let ``generate`` make the offloaded cache, and return it."""
    monkeypatch.setattr(offload, "CudaTransfer", lambda: host)
    out = model.generate(
        prompt, cache_implementation="offloaded", return_dict_in_generate=True, **GREEDY, **options
    )
    return out.past_key_values


@pytest.mark.parametrize("own", [False, True])
def test_a_prompt_in_chunks_takes_memory_once(model, cache, host, monkeypatch, own) -> None:
    made = {"max_new_tokens": 2, "prefill_chunk_size": 250}
    prompt = make_prompt(3000)
    if own:
        model.generate(prompt, past_key_values=cache, **made, **GREEDY)
    else:
        cache = generate_by_itself(model, host, monkeypatch, prompt, **made)
    assert host.times == 3
    assert host.taken == cache.host_bytes == 3 * (3000 + 1024) * OF_SLOT
    assert cache.shared.reserve == 0


def test_what_one_call_takes_does_not_count_for_the_next(model, cache, host) -> None:
    made = {"max_new_tokens": 2, "prefill_chunk_size": 250, **GREEDY}
    model.generate(make_prompt(3000), past_key_values=cache, **made)
    first = host.times
    model.generate(make_prompt(3100), past_key_values=cache, **made)  # within the room of the first
    assert host.times == first
    model.generate(make_prompt(6000), past_key_values=cache, **made)
    assert (host.times - first, cache.host_bytes) == (3, 3 * 7024 * OF_SLOT)
    cache.crop(-(cache.get_seq_length() - 10))  # within the budget: all on the device
    assert cache.host_bytes == 0
    with torch.no_grad():
        model(make_prompt(30), past_key_values=cache)
    assert cache.host_bytes == 3 * (40 + 1024) * OF_SLOT
    cache.reset()
    model.generate(make_prompt(50), past_key_values=cache, **made)
    assert cache.host_bytes == 3 * (50 + 1024) * OF_SLOT


def test_a_call_that_breaks_off_reserves_nothing(model, cache, host) -> None:
    class Break(BaseStreamer):
        def put(self, value):
            if cache.get_seq_length() >= 500:
                twins.append(copy.deepcopy(cache.shared))
                raise KeyboardInterrupt

        def end(self):
            pass

    twins: list = []
    with pytest.raises(KeyboardInterrupt):
        model.generate(
            make_prompt(3000), past_key_values=cache, max_new_tokens=9, streamer=Break(), **GREEDY
        )
    assert cache.get_seq_length() == 3000
    assert (cache.shared.reserve, twins[0].reserve) == (0, 0)
    cache.reset()
    with torch.no_grad():
        model(make_prompt(30), past_key_values=cache)
    assert cache.host_bytes == 3 * (30 + 1024) * OF_SLOT


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])
def test_a_copy_is_checked_by_the_memory_it_has(model, monkeypatch, twin_of) -> None:
    cache = dd.DeltaOffloadedCache(model.config, small_config(), transfer=Transfer())
    tokens = model.generate(make_prompt(41), past_key_values=cache, max_new_tokens=12, **GREEDY)
    twin = twin_of(cache)
    assert twin.host_bytes == 3 * 52 * OF_SLOT
    monkeypatch.setattr(offload_room, "free_host_bytes", lambda: 0)
    with torch.no_grad(), pytest.raises(dd.UnsupportedCacheError, match="for 53 tokens"):
        model(tokens[:, -1:], past_key_values=twin)
    assert lengths(twin) == [52] * 6
    with torch.no_grad():
        model(tokens[:, -1:], past_key_values=cache)  # has room


@pytest.mark.parametrize(("tokens", "steps"), [(10, 15), (10, 70), (41, 3), (41, 70)])
def test_what_is_checked_is_what_is_taken(model, host, monkeypatch, tokens, steps) -> None:
    """Memory grows layer by layer; the old and the new are there at once for one of them."""
    room_for = staticmethod(lambda tokens: tokens + max(16, tokens // 8))
    monkeypatch.setattr(offload_room.Offload, "room_for", room_for)
    made = {"max_new_tokens": steps, **GREEDY}
    prompt = make_prompt(tokens)
    caches = [dd.DeltaOffloadedCache(model.config, small_config(), transfer=host) for _ in range(2)]
    model.generate(prompt, past_key_values=caches.pop(), **made)
    needed = host.most
    assert host.held == 0 and needed
    host.size = needed - 1
    refuses(model, f"need {needed:,} more bytes", prompt, past_key_values=caches[0], **made)
    assert lengths(caches[0]) == [0] * 6
    host.size = needed
    model.generate(prompt, past_key_values=caches[0], **made)


ROOM = (82 + 1024) * OF_SLOT  # of one row of one layer


@pytest.mark.parametrize(
    ("rows", "needed", "change"),
    [
        # Two layers with four rows more, and then the new six of the third.
        (6, (2 * 4 + 6) * ROOM, lambda cache: cache.batch_repeat_interleave(3)),
        (3, (2 * 1 + 3) * ROOM, lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 1]))),
        (3, (2 * 1 + 3) * ROOM, lambda cache: cache.reorder_cache(torch.tensor([1, 0, 1]))),
        (1, ROOM, lambda cache: cache.batch_select_indices(torch.tensor([1]))),
        (1, ROOM, lambda cache: cache.batch_select_indices(torch.tensor([False, True]))),
        # Their tokens alone are copied.
        (2, 2 * 82 * OF_SLOT, lambda cache: cache.reorder_cache(torch.tensor([1, 0]))),
    ],
)
def test_other_rows_are_refused_before_a_layer_has_them(
    model, cache, host, rows, needed, change
) -> None:
    with torch.no_grad():
        model(make_prompt(82, rows=2), past_key_values=cache)
    kept = [layer.keys.clone() for layer in cache.layers]
    assert host.held == 3 * 2 * ROOM
    host.size = host.held + needed - 1
    match = f"need {needed:,} more bytes of host memory for {rows} rows, got {needed - 1:,} free"
    with pytest.raises(dd.UnsupportedCacheError, match=match):
        change(cache)
    assert all(torch.equal(a.keys, b) for a, b in zip(cache.layers, kept, strict=True))
    host.size += 1
    change(cache)
    assert {layer.keys.shape[0] for layer in cache.layers} == {rows}
    assert host.most <= host.size
    if rows != 2:
        assert host.most == host.size
