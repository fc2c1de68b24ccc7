"""What callers of Transformers do with a model and its caches: the right numbers, or one line."""

import pytest
from clsa_models import make_config, make_model

from deltadecode.errors import ModelConfigError
from deltadecode.models.clsa import ClsaConfig, ClsaForCausalLM


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be True or False, got 'no'"),
        ({"use_cache": 1}, "use_cache must be True or False, got 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "nothing else, got rope_scaling"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "nothing else, got rope_parameters"),
        ({"rope_parameters": 1e6}, "nothing else, got rope_parameters"),
    ],
)
def test_options_that_would_do_nothing_are_refused(changes, message):
    with pytest.raises(ModelConfigError, match=message):
        make_config(**changes)
    plain = {"rope_type": "default", "rope_theta": 1e4}
    assert make_config(rope_parameters=plain, rope_scaling=None).rope_theta == 1e4


def test_a_checkpoint_has_the_layers_that_it_has(tmp_path):
    make_model().save_pretrained(tmp_path)
    for made in (ClsaConfig, ClsaForCausalLM):
        with pytest.raises(ModelConfigError, match=r"of 4 layers, .* not the weights of 2"):
            made.from_pretrained(tmp_path, num_hidden_layers=2)
    assert ClsaForCausalLM.from_pretrained(tmp_path, num_hidden_layers=4).config.self_layers == 2
