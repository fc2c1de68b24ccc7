"""Muon for the matrices of attention and MLPs, Adam for everything else.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by its nearest orthogonal matrix,
found by Newton-Schulz iterations. Matrices of equal shape are orthogonalised as one batch: a
24-layer model has 168 of them, and one by one the launches would cost more than the work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al. (2024)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest orthogonal matrices, roughly, of a batch `[N, rows, columns]`."""
    a, b, c = NEWTON_SCHULZ
    wide = g.shape[-2] <= g.shape[-1]
    x = g.bfloat16() if g.is_cuda else g
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Muon over equal-shaped groups of matrices, with Nesterov momentum."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
        super().__init__([{"params": ps} for ps in by_shape.values()], {"lr": lr})
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            grads = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grads)
            buffer = state["momentum"].lerp_(grads, 1 - self.momentum)
            update = orthogonalise(grads.lerp(buffer, self.momentum))
            rows, columns = params[0].shape
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            torch._foreach_add_(params, list(update.unbind(0)), alpha=-rate)


def build_optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for matrices of attention and MLPs; Adam for embeddings, head, norms and the indexer.

    Keys and values that layers share (YOCO, CLSA) are matrices of attention like all others.
    """
    named = list(model.named_parameters())
    matrices = [
        p for name, p in named if p.dim() == 2 and (".layers." in name or ".shared_kv." in name)
    ]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    fused = others[0].is_cuda
    return [
        Muon(matrices, muon_lr),
        torch.optim.Adam(others, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, fused=fused),
    ]
