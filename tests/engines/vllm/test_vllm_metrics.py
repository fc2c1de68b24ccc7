"""Which rows of a step are counted, and how counts travel."""

from types import SimpleNamespace

from deltadecode import DeltaConfig
from deltadecode.engines.serving.counts import attended_tokens
from deltadecode.engines.serving.settings import KEY, ServingSettings
from deltadecode.engines.vllm import metrics

CONFIG = DeltaConfig(16, 6, 2, 1, (0,), (1,))
SETTINGS = ServingSettings(CONFIG, CONFIG.layer_plan(4))


def request(prompt, tokens, ended=False):
    return SimpleNamespace(num_prompt_tokens=prompt, num_tokens=tokens, is_finished=lambda: ended)


class Scheduler:
    def __init__(self, requests, others=None):
        model = SimpleNamespace(served_model_name="one")
        drafts = SimpleNamespace(num_speculative_tokens=2)
        self.vllm_config = SimpleNamespace(model_config=model, speculative_config=drafts)
        self.requests = requests
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
