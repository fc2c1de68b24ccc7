"""The proposer of lossless mode by itself: what it hands to the model, and what it captures."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from deltadecode import DeltaConfig
from deltadecode.engines.serving.settings import ServingSettings
from deltadecode.engines.serving.step import ForwardPass
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
    monkeypatch.setattr(lossless, "wrap_runner", lambda: None)
    monkeypatch.setattr(versions, "settings_of", lambda config: SETTINGS)
    one = lossless.Proposer(config)
    one.passes = []

    def forward(ids, positions, slots, draft):
        one.passes.append((ids.tolist(), positions.tolist(), slots.tolist()))
        one.passes[-1] += (draft.seq_lens.tolist(),)
        return ids + 1

    monkeypatch.setattr(one, "_forward", forward)
    one.runner = SimpleNamespace(
        device=torch.device("cpu"), max_num_reqs=20, use_async_scheduling=False,
        input_batch=SimpleNamespace(block_table=[Table(20)]),
    )  # fmt: skip
    one.bind(one.runner)
    return one


def propose(proposer, sampled, lengths, verified=None, drafts=DRAFTS):
    """Sampled tokens of each row, -1 for none, behind a pass that saw ``lengths`` tokens."""
    sampled = torch.tensor(sampled, dtype=torch.int32)
    # A chunk of a prompt samples a token as well, which is not to be used.
    discarded = torch.tensor([row[0] < 0 for row in sampled.tolist()])
    proposer.take(sampled.where(sampled >= 0, -1), discarded)
    lengths = torch.tensor([*lengths, 0, 0], dtype=torch.int32)  # with padding rows
    ends = None if verified is None else torch.tensor(verified, dtype=torch.int32).cumsum(0)
    return proposer.propose(drafts, lengths, ends)


def test_rule12_each_draft_follows_the_one_before_in_slots_of_its_own(proposer):
    # The first row has kept one of three drafts, the second is in its prompt, the last has just
    # left its own.
    sampled = [[5, 9, -1, -1], [-2, -1, -1, -1], [7, -1, -1, -1]]
    drafted = propose(proposer, sampled, [48, 300, 39], [3, 0, 0])
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


def test_newest_tokens_and_how_many_a_step_has_kept(proposer):
    newest, kept = lossless.newest_tokens(
        torch.tensor([[5, 9, -1], [4, 3, 2], [8, 7, 6]], dtype=torch.int32),
        torch.tensor([False, False, True]),
    )
    assert kept.tolist() == [2, 3, 0] and newest[:2].tolist() == [9, 2]


def test_fewer_drafts_or_none(proposer):
    assert propose(proposer, [[5], [6]], [40, 50], drafts=2).tolist() == [[6, 7], [7, 8]]
    assert len(proposer.passes) == 2
    # vLLM takes the first two.
    proposer.runner.use_async_scheduling = True
    drafted = propose(proposer, [[5], [6]], [40, 50], drafts=2)
    assert drafted.shape == (2, DRAFTS) and drafted[:, :2].tolist() == [[6, 7], [7, 8]]
    proposer.passes.clear()
    assert propose(proposer, [[5], [6]], [40, 50], drafts=0) == [[], []]
    assert not proposer.passes


def test_rule12_what_was_selected_before_plain_steps_is_forgotten(proposer):
    pages = proposer._pages
    propose(proposer, [[5]], [40])
    pages.layer(0).keep(
        ForwardPass(), torch.tensor([[0, 2]], dtype=torch.int32), torch.tensor([44])
    )
    propose(proposer, [[5]], [44], drafts=0)
    pages.begin(torch.full((pages.rows,), 48))
    # The sink page and the newest ones, as of a row that has selected nothing.
    assert pages.ids[0, 0, :4].tolist() == [0, 3, 4, 5]


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
