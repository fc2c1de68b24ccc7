"""Settings of a serving engine, and how many tokens a step attends to."""

from dataclasses import replace

import pytest
from transformers import AutoConfig

from deltadecode import DeltaConfig, DeltaConfigError, UnsupportedModelError
from deltadecode.engines.serving.counts import StepCounts, attended_tokens, describe
from deltadecode.engines.serving.settings import ServingSettings, own_settings, resolve
from deltadecode.lab.tasks import model_path


class Model:
    """The configuration of a model that has no profile."""

    model_type, hidden_size, num_hidden_layers = "llama", 64, 12
    num_attention_heads, num_key_value_heads = 4, 2
    max_position_embeddings = 4096

    def __init__(self, **more):
        self.__dict__.update(more)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pages": 3}, "unknown key 'pages' in additional_config.deltadecode"),
        ("64", "must be an object, got '64'"),
        ({"sync_heads": "yes"}, "sync_heads must be true or false, got 'yes'"),
        ({"on_unsupported": "full"}, "on_unsupported must be 'error' or 'stock', got 'full'"),
        ({"min_tokens": -1}, "min_tokens must be an int of at least 0, got -1"),
        ({"min_tokens": True}, "min_tokens must be an int of at least 0, got True"),
        ({"plan": 3}, "plan must be the path of a JSON file, got 3"),
    ],
)
def test_rule9_settings_are_refused_in_one_line(given, words):
    with pytest.raises(DeltaConfigError, match=words.replace("(", r"\(")):
        own_settings(given)


def test_rule9_a_wrong_type_comes_before_a_model_that_has_no_plan():
    windowed = Model(sliding_window=16)
    with pytest.raises(DeltaConfigError, match="budget_pages must be an int, got '64'"):
        resolve({"budget_pages": "64"}, windowed)
    with pytest.raises(UnsupportedModelError):
        resolve({"budget_pages": 64}, windowed)


def test_without_settings_it_is_the_plan_of_the_model():
    settings = resolve(None, Model())
    assert settings.config == DeltaConfig.for_model(Model())
    assert (settings.sync_heads, settings.on_unsupported) == (False, "error")


def test_settings_need_to_go_with_the_model_s_plan_alone():
    """That one has no sink page, and the class's default has one: two pages are enough here."""
    model = AutoConfig.from_pretrained(model_path())
    assert DeltaConfig.for_model(model).sink_pages == 0
    settings = resolve({"budget_pages": 2, "recent_pages": 1}, model)
    assert (settings.config.budget_pages, settings.config.sink_pages) == (2, 0)
    longer = resolve({"recent_pages": 90}, model)  # of its 100 pages
    assert longer.config.recent_pages == 90
    with pytest.raises(DeltaConfigError, match="budget_pages must be greater"):
        resolve({"budget_pages": 2, "recent_pages": 1}, Model())


def test_settings_replace_fields_of_the_model_s_plan():
    settings = resolve({"budget_pages": 32, "budget_share": 0.2, "sync_heads": True}, Model())
    assert (settings.config.budget_pages, settings.config.budget_share) == (32, 0.2)
    assert settings.config.delta_layers == DeltaConfig.for_model(Model()).delta_layers
    assert settings.sync_heads


def test_settings_replace_fields_of_a_file(tmp_path):
    path = tmp_path / "plan.json"
    DeltaConfig(budget_pages=20, dense_layers=(0,), delta_layers=(1, 5)).save(path)
    settings = resolve({"plan": str(path), "recent_pages": 2}, Model())
    assert settings.config == DeltaConfig(16, 20, 2, 1, (0,), (1, 5))


def test_resolved_settings_resolve_to_themselves():
    """Workers on other machines read them, where the file of the plan need not exist."""
    settings = resolve({"budget_pages": 32, "sync_heads": True, "min_tokens": 9}, Model())
    assert settings.min_tokens == 9
    assert resolve(settings.as_dict(), Model()) == settings


def test_min_tokens_are_the_budget_where_nothing_is_said():
    """It changes no selection: within the budget there is nothing to leave out."""
    settings = resolve({"page_size": 8, "budget_pages": 32}, Model())
    assert settings.min_tokens == 256 and not settings.reads_more_when_short
    assert "all below" not in describe(settings, 300)
    off, more = (resolve({"budget_pages": 32, "min_tokens": n}, Model()) for n in (0, 513))
    assert off.min_tokens == 0 and not off.reads_more_when_short
    assert more.reads_more_when_short


def test_rule1_the_salt_of_a_cache_is_that_of_the_plan():
    settings = resolve({"budget_pages": 32}, Model())
    same = resolve({"budget_pages": 32, "on_unsupported": "stock", "sync_heads": False}, Model())
    assert settings.cache_salt == same.cache_salt == resolve(same.as_dict(), Model()).cache_salt
    others = [{"budget_pages": 33}, {"budget_pages": 32, "sync_heads": True}, {"page_size": 8}]
    salts = {resolve(values, Model()).cache_salt for values in others}
    assert len(salts | {settings.cache_salt}) == 4


@pytest.mark.parametrize("tokens", [1, 16, 17, 95, 96, 97, 111, 112, 113, 1000])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_attended_tokens_equal_a_count_of_the_selected_pages(tokens, share):
    config = DeltaConfig(16, 6, 2, 1, (0,), (1, 3), budget_share=share)
    settings = ServingSettings(config, config.layer_plan(7, (0, 1, 3, 4, 6)))
    pages = [range(first, min(first + 16, tokens)) for first in range(0, tokens, 16)]
    budget = 32 if share and tokens == 1000 else 6  # half of 63 pages, rounded up
    # Any so many with the last one.
    chosen = pages if len(pages) <= budget else [*pages[: budget - 1], pages[-1]]
    sparse = sum(map(len, chosen))
    assert attended_tokens(settings, tokens) == (3 * tokens + 2 * sparse, 5 * tokens)


def test_the_log_names_a_share_where_there_is_one():
    config = DeltaConfig(16, 6, 2, 1, (0,), (1, 3))
    plan = config.layer_plan(7)
    assert "6 pages of 16 tokens (2 recent, 1 sink);" in describe(
        ServingSettings(config, plan), 160
    )
    config = replace(config, budget_share=0.8)
    line = describe(ServingSettings(config, plan), 160)
    assert "6 pages of 16 tokens (0.8 of all, if more; 2 recent, 1 sink);" in line
    # Three layers read all of ten pages, four read eight.
    assert line.endswith(f"attends to {(3 * 10 + 4 * 8) / 70:.1%} of them")


def test_rule11_each_token_of_a_verify_row_is_counted_with_pages_of_its_own():
    config = DeltaConfig(16, 6, 2, 1, (0,), (1, 3))
    settings = ServingSettings(config, config.layer_plan(7, (0, 1, 3, 4, 6)))
    counts = StepCounts(settings)
    counts.add([200], [1])
    assert counts.take() == attended_tokens(settings, 200)
    counts.add([200, 95], [1, 1])
    both = zip(attended_tokens(settings, 200), attended_tokens(settings, 95), strict=True)
    assert counts.take() == tuple(map(sum, both))
    counts.add([95], [3])  # the last of them is on the seventh page
    each = [attended_tokens(settings, tokens) for tokens in (95, 96, 97)]
    assert [attended == full for attended, full in each] == [True, True, False]
    assert counts.take() == tuple(map(sum, zip(*each, strict=True)))
    counts.add([], [])
    assert counts.take() == (0, 0)


def test_rule11_rows_below_min_tokens_are_counted_in_full():
    config = DeltaConfig(16, 6, 2, 1, (0,), (1, 3))
    settings = ServingSettings(config, config.layer_plan(7, (0, 1, 3, 4, 6)), min_tokens=201)
    counts = StepCounts(settings)
    counts.add([200], [1])
    assert counts.take() == (1000, 1000)
    counts.add([200], [2])
    assert counts.take() == (1000 + attended_tokens(settings, 201)[0], 1000 + 1005)
    assert attended_tokens(settings, 201) == attended_tokens(replace(settings, min_tokens=0), 201)
    assert ", all below 201 tokens; " in describe(settings, 300)


def test_rule11_drafts_and_what_verifies_them_are_counted():
    config = DeltaConfig(16, 6, 2, 1, (0,), (1, 3))
    counts = StepCounts(ServingSettings(config, config.layer_plan(7, (0, 1, 3, 4, 6))))
    # 199 tokens were verified: 6 of 13 pages are selected, the last of them with the 200th token.
    read = sum(5 * 16 + (tokens - 12 * 16) for tokens in (200, 201, 202))
    counts.add_verifications([200], [4], [3])
    assert counts.take() == (5 * (read + 203), 5 * (200 + 201 + 202))
    # Everything is read of a row within the budget, and nothing is drafted of a row alone.
    counts.add_verifications([50, 300], [3, 1], [1, 1])
    assert counts.take() == (5 * (50 + 51 + 52 + 300), 5 * (50 + 300))


def test_the_log_says_what_drafts_read():
    config = DeltaConfig(16, 6, 2, 1, (0,), (1, 3))
    line = describe(ServingSettings(config, config.layer_plan(7)), 160, 4)
    words = "up to 4 drafts of a step read 6 pages of 16 tokens (2 recent, 1 sink) in each of 7"
    assert line.startswith(f"lossless: {words} layers")


@pytest.mark.parametrize("min_tokens", [None, 0, 300, 10**30])
@pytest.mark.parametrize(
    "pages",
    [(64, 8, 1), (10**30, 8, 1), (10**30, 10**29, 0), (10**30, 3, 10**29), (100, 90, 8), (3, 1, 1)],
)
def test_what_is_within_a_length_reads_the_same(pages, min_tokens):
    budget, recent, sinks = pages
    given = {"budget_pages": budget, "recent_pages": recent, "sink_pages": sinks}
    if min_tokens is not None:
        given["min_tokens"] = min_tokens
    settings = resolve({**given, "page_size": 8}, Model())
    for longest in (1, 8, 250, 800):
        within = settings.within(longest)
        assert within.config.budget_pages <= max(2 * -(-longest // 8) + 1, 1)
        assert within.min_tokens <= max(longest, 8 * within.config.budget_pages) + 1
        # What lossless mode asks: whether the user has said from where on to draft.
        defaults = [each.min_tokens == 8 * each.config.budget_pages for each in (settings, within)]
        assert defaults[0] == defaults[1]
        for tokens in range(1, longest + 1):
            cfg = settings.config
            all_of_it = cfg.reads_all(tokens) or tokens < settings.min_tokens
            assert (within.config.reads_all(tokens) or tokens < within.min_tokens) == all_of_it
            if not all_of_it:
                assert within.config == cfg
    if 10**30 not in (budget, min_tokens):
        assert settings.within(2**40) == settings
    assert "attends to" in describe(settings, 800)
