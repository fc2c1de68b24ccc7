"""Which rows of a step are counted, and how counts travel."""

from types import SimpleNamespace

import pytest

from deltadecode import DeltaConfig
from deltadecode.engines.serving.counts import attended_tokens
from deltadecode.engines.serving.settings import KEY, ServingSettings
from deltadecode.engines.vllm import metrics

CONFIG = DeltaConfig(16, 6, 2, 1, (0,), (1,))
SETTINGS = ServingSettings(CONFIG, CONFIG.layer_plan(4))


def request(prompt, tokens, ended=False):
    return SimpleNamespace(num_prompt_tokens=prompt, num_tokens=tokens, is_finished=lambda: ended)


class Scheduler:
    def __init__(self, requests, others=None, drafts=2):
        model = SimpleNamespace(served_model_name="one")
        drafts = SimpleNamespace(num_speculative_tokens=drafts)
        self.vllm_config = SimpleNamespace(model_config=model, speculative_config=drafts)
        for name, one in requests.items():
            one.request_id = name
        self.requests = requests
        self.running = [one for one in requests.values() if not one.is_finished()]
        self.others = others

    def update_from_output(self, output, result):
        return result, self.make_stats()

    def make_stats(self):
        return SimpleNamespace(kv_connector_stats=self.others)


def step(rows):
    """``rows``: name -> tokens computed before, and new ones."""
    return SimpleNamespace(
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(rows), num_computed_tokens=[computed for computed, _ in rows.values()]
        ),
        num_scheduled_tokens={name: new for name, (_, new) in rows.items()},
        total_num_scheduled_tokens=sum(new for _, new in rows.values()),
    )


def test_rule11_only_decode_rows_of_requests_that_go_on_are_counted():
    scheduler = Scheduler(
        {
            "decodes": request(100, 120),
            "last of its prompt": request(100, 100),
            "again after preemption": request(100, 150),
            "end of that": request(100, 150),
            "drafts": request(100, 130),
            "ended": request(100, 120, ended=True),
        }
    )
    metrics.count_steps(scheduler, SETTINGS)
    rows = {
        "decodes": (119, 1), "last of its prompt": (99, 1), "again after preemption": (112, 38),
        "end of that": (139, 2), "drafts": (131, 3), "ended": (119, 1), "aborted": (50, 1),
    }  # fmt: skip
    result, stats = scheduler.update_from_output(step(rows), "result")
    one, all_of_it = attended_tokens(SETTINGS, 120)
    for tokens in (140, 141, 130, 131, 132):  # each draft reads pages of its own
        more, full = attended_tokens(SETTINGS, tokens)
        one, all_of_it = one + more, all_of_it + full
    assert one < all_of_it
    assert result == "result"
    assert stats.kv_connector_stats == {KEY: ["one", one, all_of_it]}
    assert scheduler.make_stats().kv_connector_stats is None


def test_what_a_connector_sends_stays_beside_the_counts():
    scheduler = Scheduler({"decodes": request(100, 120)}, {"moved": 3})
    metrics.count_steps(scheduler, SETTINGS)
    _, stats = scheduler.update_from_output(step({"decodes": (119, 1)}), None)
    seen = []
    read = metrics._read_counts(lambda self, stats: seen.append(stats and stats.kv_connector_stats))
    read(None, stats)
    read(None, None)
    assert seen == [{"moved": 3}, None]


def run(scheduler, rows):
    """One step; gives what it was counted as."""
    result = scheduler.update_from_output(step(rows), None)[1].kv_connector_stats
    for name, (computed, new) in rows.items():
        if name in scheduler.requests:
            scheduler.requests[name].num_tokens = computed + new + 1
    return tuple(result[KEY][1:]) if result else (0, 0)


def ends(scheduler):
    del scheduler.requests["b"], scheduler.running[1]


def ends_while_its_cache_is_sent(scheduler):
    scheduler.running.pop(1).is_finished = lambda: True


def ends_before_one_that_comes(scheduler):
    ends(scheduler)
    scheduler.requests["d"] = one = request(10, 10)
    one.request_id = "d"
    scheduler.running.append(one)


@pytest.mark.parametrize("end", [ends, ends_while_its_cache_is_sent, ends_before_one_that_comes])
@pytest.mark.parametrize("drafts", [0, 2])
def test_rule11_steps_of_the_same_rows_are_counted_as_each_alone(end, drafts):
    """Also where a row ends after it has been scheduled again, or is computed again."""

    def expected(*lengths):
        return tuple(map(sum, zip(*(attended_tokens(SETTINGS, n) for n in lengths), strict=True)))

    requests = {"a": request(50, 90), "b": request(100, 120), "c": request(5000, 4001)}
    scheduler = Scheduler(requests, drafts=drafts)
    metrics.count_steps(scheduler, SETTINGS)
    for more in range(4):
        rows = {"a": (89 + more, 1), "b": (119 + more, 1), "c": (4000 + more, 1)}
        assert run(scheduler, rows) == expected(90 + more, 120 + more)
    # The last chunk of a prompt, and what comes behind it.
    rows = {"a": (93, 1), "b": (123, 1), "c": (4004, 996)}
    assert run(scheduler, rows) == expected(94, 124)
    for more in range(3):
        rows = {"a": (94 + more, 1), "b": (124 + more, 1), "c": (5000 + more, 1)}
        assert run(scheduler, rows) == expected(95 + more, 125 + more, 5001 + more)
    # After preemptions: the cache had a part of the prompt, or that and more.
    rows = {"a": (97, 1), "b": (90, 1), "c": (5003, 1)}
    assert run(scheduler, rows) == expected(98, 5004)
    rows = {"a": (60, 38), "b": (91, 36), "c": (5004, 1)}
    assert run(scheduler, rows) == expected(5005)
    # One may write no more tokens, which the scheduler knows before it has ended.
    for more in range(2):
        rows = {"a": (98 + more, 1), "c": (5005 + more, 1)}
        assert run(scheduler, rows) == expected(99 + more, 5006 + more)
    for more in range(5):
        rows = {"a": (100 + more, 1), "b": (127 + more, 1), "c": (5007 + more, 1)}
        if more == 3:
            end(scheduler)
        left = [128 + more] if more < 3 else []
        assert run(scheduler, rows) == expected(101 + more, *left, 5008 + more)


def test_rule11_a_session_that_goes_on_has_a_longer_prompt():
    """With asynchronous scheduling it may be the last row again before its older step ends."""
    requests = {"a": request(50, 90), "b": request(100, 120)}
    scheduler = Scheduler(requests, drafts=0)
    metrics.count_steps(scheduler, SETTINGS)
    for more in range(3):
        run(scheduler, {"a": (89 + more, 1), "b": (119 + more, 1)})
    requests["b"].num_prompt_tokens = 150
    assert run(scheduler, {"a": (92, 1), "b": (122, 1)}) == attended_tokens(SETTINGS, 93)
    assert run(scheduler, {"a": (93, 1), "b": (123, 1)}) == attended_tokens(SETTINGS, 94)


def test_rule11_rejected_drafts_of_an_earlier_step_are_no_tokens():
    scheduler = Scheduler({"a": request(50, 90)})
    metrics.count_steps(scheduler, SETTINGS)
    for _ in range(3):
        scheduler.requests["a"].num_tokens = 90
        assert run(scheduler, {"a": (91, 1)}) == attended_tokens(SETTINGS, 90)
