"""Losses that a rule makes up, in place of a model's: does a search find what is best?"""

from itertools import pairwise

import numpy as np
from transformers import LlamaConfig

from deltadecode import DeltaConfig
from deltadecode.lab.calibration.losses import Losses, Rows
from deltadecode.lab.calibration.space import Request, Space
from deltadecode.lab.calibration.texts import Piece

LAYERS = 14
BASE = DeltaConfig(page_size=4, budget_pages=20, recent_pages=4, sink_pages=1,
                   dense_layers=(0, 1), delta_layers=(2, 7))  # fmt: skip


def config(layers=LAYERS):
    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
    )  # fmt: skip


def space(request=None, layers=LAYERS, context=1000):
    lengths = np.array([float(context)])
    return Space(config(layers), request or Request(BASE, fraction=0.4), lengths)


class MadeLosses(Losses):
    """A sparse layer loses by its distance from its source, some layers more, K and L a little."""

    def __init__(self, space, texts=6, needy=(5, 11), noise=0.05, state=None):
        pieces = [Piece([text] * 30, 10) for text in range(texts)]
        super().__init__(config(space.layers), space, pieces, state)
        self.needy, self.noise, self.seen = needy, noise, []

    def _measured(self, cfg, text):
        self.seen.append((cfg, text))
        self.passes += 1
        full = (*self.space.places(cfg), self.space.layers)
        loss = 0.02 * abs(cfg.recent_pages - 16) / cfg.budget_pages + 0.3 * (cfg.sink_pages == 0)
        for source, end in pairwise(full):
            for layer in range(source + 1, end):
                loss += (layer - source) ** 0.5 * (8 if layer in self.needy else 1) * 0.01
        loss /= cfg.budget_pages**0.5
        noise = np.random.default_rng(abs(hash((text, full))) % 2**32)
        rows = loss * (1 + self.noise * noise.standard_normal(20)) + 0.001 * text
        return Rows(rows, rows / 2, np.ones(20))
