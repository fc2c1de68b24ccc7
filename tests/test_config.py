"""DeltaConfig and LayerPlan: rules R8 and R9 of docs/semantics.md, and the JSON form."""

import json
import math
from dataclasses import FrozenInstanceError
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltadecode.architecture import attention_layers
from deltadecode.config import DeltaConfig
from deltadecode.errors import DeltaConfigError, DeltaDecodeError, UnsupportedModelError
from deltadecode.plan_files import load_meta
from deltadecode.profiles import find_profile, profiles


def model(layers, model_type="llama", hidden=256, heads=4, kv_heads=2, **more):
    return SimpleNamespace(
        model_type=model_type,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **more,
    )


def refused(*words):
    """Expect one line that holds all the words."""

    class Refused:
        def __enter__(self):
            self.raises = pytest.raises(DeltaConfigError)
            self.info = self.raises.__enter__()
            return self.info

        def __exit__(self, *error):
            done = self.raises.__exit__(*error)
            message = str(self.info.value)
            assert "\n" not in message
            for word in words:
                assert word in message, f"{word!r} is not in {message!r}"
            return done

    return Refused()


def test_defaults_are_the_documented_ones():
    cfg = DeltaConfig()
    assert (cfg.page_size, cfg.budget_pages, cfg.recent_pages, cfg.sink_pages) == (16, 64, 8, 1)
    assert cfg.dense_layers == (0, 1)
    assert cfg.delta_layers == (2, 14, 22)


def test_errors_are_value_errors():
    assert issubclass(DeltaConfigError, DeltaDecodeError)
    assert issubclass(UnsupportedModelError, DeltaDecodeError)
    assert issubclass(DeltaDecodeError, ValueError)


def test_roles_and_sources_of_the_papers_plan():
    plan = DeltaConfig().layer_plan(num_layers=28)
    assert plan.num_layers == 28
    assert plan.attention_layers == tuple(range(28))
    assert [plan.role(i) for i in range(4)] == ["dense", "dense", "delta", "sparse"]
    assert [i for i in range(28) if plan.role(i) == "delta"] == [2, 14, 22]
    assert sum(plan.role(i) == "sparse" for i in range(28)) == 23
    assert [plan.source(i) for i in (0, 1, 2, 3, 13, 14, 15, 21, 22, 23, 27)] == [
        None, None, None, 2, 2, None, 14, 14, None, 22, 22,
    ]  # fmt: skip


def test_a_plan_has_no_layer_outside_it():
    plan = DeltaConfig().layer_plan(28)
    for layer in (-1, 28):
        with pytest.raises(IndexError, match=str(layer)):
            plan.role(layer)
        with pytest.raises(IndexError, match=str(layer)):
            plan.source(layer)


def test_rule8_other_layers_keep_their_own_attention():
    full = (5, 11, 17, 23)
    plan = DeltaConfig(dense_layers=(5,), delta_layers=(11,)).layer_plan(24, full)
    assert plan.attention_layers == full
    assert [plan.role(i) for i in full] == ["dense", "delta", "sparse", "sparse"]
    assert [plan.source(i) for i in full] == [None, None, 11, 11]
    others = [i for i in range(24) if i not in full]
    assert {plan.role(i) for i in others} == {"own"}
    assert {plan.source(i) for i in others} == {None}


def test_rule8_a_dense_number_on_another_layer_is_tolerated_a_delta_number_is_not():
    full = (1, 3, 5)
    plan = DeltaConfig(dense_layers=(0, 1), delta_layers=(3,)).layer_plan(6, full)
    assert plan.role(0) == "own"
    assert plan.role(1) == "dense"
    with refused("delta_layers", "2", "1, 3, 5"):
        DeltaConfig(dense_layers=(0, 1), delta_layers=(2,)).layer_plan(6, full)


def test_rule9_budget_exceeds_the_forced_pages():
    with refused("budget_pages", "recent_pages + sink_pages", "8 <= 8 + 1"):
        DeltaConfig(budget_pages=8)
    with refused("12 <= 8 + 4"):
        DeltaConfig(budget_pages=12, sink_pages=4)
    assert DeltaConfig(budget_pages=13, sink_pages=4).budget_pages == 13
    assert DeltaConfig(budget_pages=1, recent_pages=0, sink_pages=0).budget_pages == 1


@pytest.mark.parametrize(
    ("field", "least"),
    [("page_size", 1), ("budget_pages", 1), ("recent_pages", 0), ("sink_pages", 0)],
)
def test_rule9_counts_have_a_least_value(field, least):
    with refused(field, f"at least {least}", str(least - 1)):
        DeltaConfig(**{field: least - 1})


@pytest.mark.parametrize("field", ["page_size", "budget_pages", "recent_pages", "sink_pages"])
@pytest.mark.parametrize("value", [True, 16.0, "16", None])
def test_rule9_counts_are_ints(field, value):
    with refused(field, "int", repr(value)):
        DeltaConfig(**{field: value})


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, math.nan, math.inf, True, "0.1", None, 10**400])
def test_rule9_a_share_is_a_number_below_one(value):
    with refused("budget_share", "[0, 1)", repr(value)):
        DeltaConfig(budget_share=value)


def test_rule4_a_share_gives_whole_pages_rounded_up():
    cfg = DeltaConfig(budget_share=0.1)
    assert [cfg.pages_for(pages) for pages in (0, 640, 641, 4100, 4101)] == [64, 64, 65, 410, 411]
    assert [cfg.table_width(pages) for pages in (0, 640, 641, 1290)] == [64, 64, 128, 256]
    third = DeltaConfig(budget_share=1 / 3)  # 3333 / 10000
    assert [third.pages_for(pages) for pages in (300, 30_000)] == [100, 9999]
    assert DeltaConfig(budget_pages=100).table_width(5000) == 100
    assert DeltaConfig(budget_share=0) == DeltaConfig(budget_share=0.0) == DeltaConfig()
    assert type(DeltaConfig(budget_share=0).budget_share) is float


@settings(deadline=None)
@given(
    share=st.floats(0, 1, exclude_max=True), pages=st.integers(0, 2**31 - 1), budget=st.integers(10)
)
def test_rule4_the_budget_of_a_row_is_exact(share, pages, budget):
    cfg = DeltaConfig(budget_pages=budget, budget_share=share)
    exact = max(budget, math.ceil(Fraction(round(share * 10_000), 10_000) * pages))
    assert cfg.pages_for(pages) == exact
    assert exact <= max(budget, pages)
    assert cfg.table_width(pages) >= exact
    assert cfg.pages_for(pages) <= cfg.pages_for(pages + 1)


@pytest.mark.parametrize("field", ["dense_layers", "delta_layers"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ((0, True), ("ints", "True")),
        ((0, 1.0), ("ints", "1.0")),
        (("0",), ("ints", "'0'")),
        ((-1, 3), ("negative", "-1")),
        ((3, 2), ("ascend", "2 after 3")),
        ((3, 3), ("ascend", "3 after 3")),
        (3, ("list or tuple", "3")),
        ("01", ("list or tuple", "'01'")),
        ({1, 2}, ("list or tuple", "{1, 2}")),
        (None, ("list or tuple", "None")),
    ],
)
def test_rule9_layer_numbers(field, value, words):
    with refused(field, *words):
        DeltaConfig(**{field: value})


def test_rule9_delta_layers_come_after_the_dense_ones():
    with refused("after the dense", "Δ-layer 1", "dense layer 1"):
        DeltaConfig(dense_layers=(0, 1), delta_layers=(1, 4))
    with refused("after the dense", "Δ-layer 2", "dense layer 5"):
        DeltaConfig(dense_layers=(0, 5), delta_layers=(2, 8))


def test_rule9_layers_are_in_range_a_plan_for_another_depth():
    with refused("delta_layers", "22", "0..15", "16 layers"):
        DeltaConfig().layer_plan(16)
    with refused("dense_layers", "9", "0..3"):
        DeltaConfig(dense_layers=(0, 9), delta_layers=()).layer_plan(4)
    with refused("attention_layers", "28", "0..27"):
        DeltaConfig().layer_plan(28, (0, 1, 2, 14, 22, 28))


def test_rule9_every_sparse_layer_has_a_delta_layer_before_it():
    with refused("sparse layer 1", "Δ-layer before it", "2"):
        DeltaConfig(dense_layers=(0,), delta_layers=(2,)).layer_plan(4)
    with refused("sparse layer 2", "none"):
        DeltaConfig(delta_layers=()).layer_plan(3)
    assert DeltaConfig(delta_layers=()).layer_plan(2).role(1) == "dense"
    assert DeltaConfig(dense_layers=(), delta_layers=(0,)).layer_plan(2).source(1) == 0


@pytest.mark.parametrize("value", [0, -1, True, 28.0, None])
def test_rule9_depth_is_a_positive_int(value):
    with refused("num_layers", repr(value)):
        DeltaConfig().layer_plan(value)


def test_lists_become_tuples_and_a_config_is_frozen():
    cfg = DeltaConfig(dense_layers=[0], delta_layers=[1, 3])
    assert cfg == DeltaConfig(dense_layers=(0,), delta_layers=(1, 3))
    assert hash(cfg) == hash(DeltaConfig(dense_layers=(0,), delta_layers=(1, 3)))
    with pytest.raises(FrozenInstanceError):
        cfg.page_size = 8
    assert DeltaConfig().layer_plan(28, list(range(28))).attention_layers == tuple(range(28))


ascending = st.lists(st.integers(0, 60), unique=True, max_size=8).map(sorted)


@settings(deadline=None)
@given(
    page_size=st.integers(1, 256),
    recent=st.integers(0, 9),
    sinks=st.integers(0, 9),
    spare=st.integers(1, 99),
    share=st.floats(0, 1, exclude_max=True),
    layers=ascending,
    cut=st.integers(0, 8),
)
def test_load_gives_what_save_wrote(
    tmp_path_factory, page_size, recent, sinks, spare, share, layers, cut
):
    cfg = DeltaConfig(
        page_size, recent + sinks + spare, recent, sinks, layers[:cut], layers[cut:],
        budget_share=share,
    )  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "plan.json"
    cfg.save(path)
    assert DeltaConfig.load(path) == cfg
    assert DeltaConfig.load(str(path)) == cfg


def write(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_may_leave_out_fields_and_hold_remarks(tmp_path):
    path = write(tmp_path, '{"budget_pages": 32, "meta": {"title": "mine", "any": [1]}}')
    assert DeltaConfig.load(path) == DeltaConfig(budget_pages=32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"budget": 3}', ("unknown key 'budget'", "budget_pages")),
        ('{"page_size": "16"}', ("page_size", "'16'")),
        ('{"page_size": 16.0}', ("page_size", "16.0")),
        ('{"page_size": true}', ("page_size", "True")),
        ('{"budget_share": NaN}', ("budget_share", "nan")),
        ('{"budget_share": 1}', ("budget_share", "got 1")),
        ('{"delta_layers": 2}', ("delta_layers", "2")),
        ('{"delta_layers": [2, null]}', ("delta_layers", "None")),
        ('{"budget_pages": 4}', ("budget_pages", "4 <= 8 + 1")),
        ('{"meta": 3}', ("meta", "3")),
        ("[1]", ("one JSON object", "list")),
        ("{", ("not JSON",)),
        ("", ("not JSON",)),
        ("[" * 100_000, ("not JSON", "recursion")),
    ],
)
def test_load_refuses(tmp_path, text, words):
    path = write(tmp_path, text)
    with refused("plan.json", *words):
        DeltaConfig.load(path)


def test_load_refuses_files_that_cannot_be_read(tmp_path):
    with refused("nowhere.json", "No such file"):
        DeltaConfig.load(tmp_path / "nowhere.json")
    with refused(tmp_path.name, "cannot read"):
        DeltaConfig.load(tmp_path)
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00")
    with refused("plan.json", "not JSON"):
        DeltaConfig.load(path)


AUTHORS = [
    ((28, "qwen2", 1536, 12, 2), (2, 14, 22)),
    ((28, "qwen2", 3584, 28, 4), (2, 14, 22)),
    ((48, "qwen2", 5120, 40, 8), (2, 6, 42)),
]


@pytest.mark.parametrize(("shape", "delta_layers"), AUTHORS)
def test_known_models_get_the_authors_plan(shape, delta_layers):
    cfg = DeltaConfig.for_model(model(*shape))
    # The plans of the paper's authors have no sink page.
    assert cfg == DeltaConfig(sink_pages=0, dense_layers=(0, 1), delta_layers=delta_layers)
    wrapped = SimpleNamespace(config=model(*shape))
    assert DeltaConfig.for_model(wrapped) == cfg


def test_one_fact_that_differs_is_another_model():
    shape, _ = AUTHORS[2]
    plans = [DeltaConfig.for_model(model(*shape)).delta_layers]
    for place, value in enumerate((40, "qwen3", 5121, 20, 4)):
        other = (*shape[:place], value, *shape[place + 1 :])
        plans.append(DeltaConfig.for_model(model(*other)).delta_layers)
    assert plans == [(2, 6, 42), (2, 10, 18, 26)] + [(2, 11, 21, 30)] * 4


def test_the_embedded_models_plans_are_those_of_the_calibration_on_file():
    results = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    measured = json.loads((results / "calibration-20261124-embedded.json").read_text())["plans"]
    for name, plan in profiles()["deltadecode-chain"]["meta"]["plans"].items():
        assert plan == {key: measured[name][key] for key in ("dense_layers", "delta_layers")}, name


def test_meta_is_kept_in_the_file_and_out_of_the_configuration(tmp_path):
    cfg = DeltaConfig(delta_layers=(2, 5))
    cfg.save(tmp_path / "plan.json", meta={"model": "Δ", "expected": {"recall": 0.5}})
    assert DeltaConfig.load(tmp_path / "plan.json") == cfg
    assert load_meta(tmp_path / "plan.json") == {"model": "Δ", "expected": {"recall": 0.5}}
    cfg.save(tmp_path / "plain.json")
    assert load_meta(tmp_path / "plain.json") == {}


@pytest.mark.parametrize("path", [None, 3, b"plan.json"])
def test_paths_of_other_types_are_refused(path):
    for use in (DeltaConfig.load, DeltaConfig(delta_layers=(2,)).save):
        with refused("path must be a str or a path", repr(path)):
            use(path)


def test_what_json_cannot_hold_is_refused_and_nothing_written(tmp_path):
    cfg = DeltaConfig(delta_layers=(2,))
    for meta, words in ((3, "a mapping, got 3"), ({"a": {1}}, "what JSON can hold")):
        with refused("meta must be", words):
            cfg.save(tmp_path / "plan.json", meta=meta)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("values", [None, 3, [("page_size", 8)]])
def test_values_that_are_no_mapping_are_refused(values):
    with refused("values must be a mapping", type(values).__name__):
        DeltaConfig.from_dict(values)


def test_every_profile_is_a_config_that_fits_its_model():
    assert len(profiles()) >= 3
    for name, profile in profiles().items():
        match = profile["meta"]["match"]
        assert profile["meta"]["title"] and profile["meta"]["source"], name
        assert find_profile(match) is profile, name
        cfg = DeltaConfig.from_dict(json.loads(json.dumps(profile)))
        cfg.layer_plan(match["num_hidden_layers"])


@pytest.mark.parametrize(
    ("depth", "dense", "delta"),
    [
        (1, (0,), ()),
        (2, (), (0,)),
        (3, (), (0,)),
        (4, (), (0, 2)),
        (5, (), (0, 2)),
        (6, (0, 1), (2, 4)),
        (7, (0, 1), (2, 4)),
        (8, (0, 1), (2, 5)),
        (12, (0, 1), (2, 4, 6, 9)),
        (24, (0, 1), (2, 6, 11, 16)),
        (28, (0, 1), (2, 7, 13, 18)),
        (30, (0, 1), (2, 8, 14, 20)),
        (48, (0, 1), (2, 11, 21, 30)),
    ],
)
def test_default_plan(depth, dense, delta):
    cfg = DeltaConfig.for_model(model(depth))
    assert (cfg.dense_layers, cfg.delta_layers) == (dense, delta)
    assert (cfg.page_size, cfg.budget_pages, cfg.recent_pages, cfg.sink_pages) == (8, 96, 16, 1)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=70).filter(any))
def test_default_plan_fits_any_model(full):
    types = ["full_attention" if yes else "sliding_attention" for yes in full]
    config = model(len(full), layer_types=types)
    plan = DeltaConfig.for_model(config).layer_plan(len(full), attention_layers(config))
    roles = [plan.role(i) for i in plan.attention_layers]
    start = ["dense", "dense", "delta"] if len(roles) >= 6 else ["delta"]
    assert roles[: len(start)] == (start if len(roles) > 1 else ["dense"])
    # A Δ-layer whose pages nobody reads would be waste.
    for delta in [i for i, role in enumerate(roles) if role == "delta"]:
        assert roles[delta + 1] == "sparse"


def test_for_model_refuses_what_cannot_be_planned():
    with pytest.raises(UnsupportedModelError, match=r"SimpleNamespace.*latent"):
        DeltaConfig.for_model(model(4, kv_lora_rank=512))
    with pytest.raises(UnsupportedModelError, match="no model configuration"):
        DeltaConfig.for_model("a/path")
