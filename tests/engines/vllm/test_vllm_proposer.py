"""The proposer of lossless mode by itself: what it hands to the model, and what it captures."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deltadecode import DeltaConfig
from deltadecode.engines.serving.settings import ServingSettings
from deltadecode.engines.vllm import lossless, versions
from deltadecode.engines.vllm.implementation import DeltaImpl
from deltadecode_vllm import PROPOSER

CONFIG = DeltaConfig(8, 4, 1, 1, (), (0,))
SETTINGS = ServingSettings(CONFIG, CONFIG.layer_plan(2), min_tokens=0)
BLOCK, DRAFTS = 16, 3


class Impl(DeltaImpl):
    num_kv_heads, head_size, cache_bytes = 1, 8, 4

    def __init__(self):
        pass


class Table:
    block_size = BLOCK

    def __init__(self, rows):
        self.gpu = torch.arange(rows * 8, dtype=torch.int32).view(rows, 8) + 100

    def get_device_tensor(self, count):
        return self.gpu[:count]


@pytest.fixture
def proposer(monkeypatch):
    """A proposer whose model repeats a token plus one, and the passes that it ran."""
    layers = {f"model.layers.{n}.attn": SimpleNamespace(impl=Impl()) for n in range(2)}
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=DRAFTS, model=PROPOSER),
        compilation_config=SimpleNamespace(
            static_forward_context=layers, max_cudagraph_capture_size=0, cudagraph_mode="FULL"
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=20),
    )
    monkeypatch.setattr(versions, "check_backend", lambda config: None)
    monkeypatch.setattr(versions, "pass_runners", lambda: None)
    monkeypatch.setattr(versions, "settings_of", lambda config: SETTINGS)
    one = lossless.Proposer(config)
    one.passes = []

    def forward(ids, positions, slots, draft):
        one.passes.append((ids.tolist(), positions.tolist(), slots.tolist()))
        one.passes[-1] += (draft.seq_lens.tolist(),)
        return ids + 1

    monkeypatch.setattr(one, "_forward", forward)
    one.runner = SimpleNamespace(
        device=torch.device("cpu"), max_num_reqs=20, get_model=lambda: torch.nn.Linear(2, 2),
        input_batch=SimpleNamespace(block_table=[Table(20)]),
    )  # fmt: skip
    one.bind(one.runner)
    return one


def propose(proposer, sampled, tokens):
    return proposer.propose(sampled, np.array(tokens), None, slot_mappings={})


def test_rule12_each_draft_follows_the_one_before_in_slots_of_its_own(proposer):
    # The second row is in its prompt still; the first has kept two tokens of its verification.
    drafted = propose(proposer, [[5, 9], [], [7]], [47, 300, 40])
    assert drafted[[0, 2]].tolist() == [[10, 11, 12], [8, 9, 10]]
    assert len(proposer.passes) == DRAFTS
    for place, (ids, positions, slots, lengths) in enumerate(proposer.passes):
        assert (ids[0], ids[2]) == (9 + place, 7 + place)
        assert (positions[0], positions[2]) == (46 + place, 39 + place)
        assert lengths == [47 + place, 0, 40 + place]
        blocks = 100 + (46 + place) // BLOCK, 116 + (39 + place) // BLOCK
        offsets = (46 + place) % BLOCK, (39 + place) % BLOCK
        first, last = (BLOCK * b + o for b, o in zip(blocks, offsets, strict=True))
        assert slots == [first, -1, last]


def test_nothing_is_drafted_within_the_budget_or_in_prompts(proposer):
    assert propose(proposer, [[5], [6]], [32, 20]) == [[], []]
    assert propose(proposer, [[], []], [99, 99]) == [[], []]
    assert proposer.passes == []


def test_drafts_are_captured_for_a_few_sizes_and_run_from_the_next_one(proposer, monkeypatch):
    replayed = []

    class Graph:
        def replay(self):
            replayed.append(self)

    @contextlib.contextmanager
    def nothing(*args, **kwargs):
        yield

    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    monkeypatch.setattr(parallel_state, "graph_capture", nothing)
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    for name, stand_in in {
        "CUDAGraph": Graph, "graph": nothing, "synchronize": nothing, "current_stream": nothing,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    proposer.capture(proposer.runner)
    sizes = [len(ids) for ids, *_ in proposer.passes]
    # Each twice, once to compile; no row of theirs writes or reads anything.
    assert sizes == [size for size in (20, 16, 8, 4, 2, 1) for _ in range(2)]
    assert all(set(slots) == {-1} and set(lengths) == {0} for *_, slots, lengths in proposer.passes)
    proposer.passes.clear()
    propose(proposer, [[5]] * 9, [100] * 9)
    start, *drafts = replayed
    assert drafts == [proposer._graphs[16].__self__] * DRAFTS and start not in drafts
    assert proposer.passes == []
