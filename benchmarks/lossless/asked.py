"""What a run of the benchmark was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

# A context, K, and drafts before a verification; 0 drafts: as many as are found to pay.
Case = tuple[int, int, int]


@dataclass(frozen=True)
class Asked:
    """Each context with each budget and number of drafts, in tokens of ``texts`` prompts."""

    folder: str  # of the model
    contexts: Sequence[int]
    budgets: Sequence[int]
    drafts: Sequence[int]
    page_size: int
    texts: int  # of each context
    tokens: int  # new ones of each text
    device: str = "cpu"
    static: bool = False  # both sides from a static cache

    @property
    def cases(self) -> list[Case]:
        """In the order of a result's rows."""
        return list(product(self.contexts, self.budgets, self.drafts))

    @property
    def parts(self) -> int:
        """Of the work: full attention and all cases of each context."""
        return len(self.contexts) * (1 + len(self.budgets) * len(self.drafts))
