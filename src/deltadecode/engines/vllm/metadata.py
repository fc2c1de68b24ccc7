"""Attention metadata of our own: that of a draft, which vLLM has no builder for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deltadecode.engines.serving.drafting import DraftPages
from deltadecode.ops import Scratch


@dataclass
class DraftPass:
    """A forward pass of one token of each row, in which every layer reads selected pages.

    Attributes
    ----------
    block_table, seq_lens : Tensor
        Of the rows; one of 0 tokens drafts nothing.
    pages : DraftPages
        What each layer reads.
    scratch : Scratch
        Memory of the kernels.
    """

    block_table: Tensor
    seq_lens: Tensor
    pages: DraftPages
    scratch: Scratch
