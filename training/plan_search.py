"""Find the embedded model's layer plan, and count exact problems under it.

    python training/plan_search.py --workdir DIR --problems 200

Decoding a deterministic text greedily is right exactly when the teacher-forced argmax of every
token is, so one masked pass over prompt and solution stands for a whole generation: prompt
queries see everything before them, solution queries see what DELTA would let them see.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from model import Llama, Shape, rope_tables
from torch import Tensor

from deltadecode.lab.tasks.chain import make_problem
from deltadecode.lab.tasks.vocabulary import EOS_ID, encode

ROWS = 1024  # queries of a Δ-layer at a time
FIRST_SEED = 1_000_000_000  # problems of the search; training seeds are drawn from 62 bits


@dataclass(frozen=True)
class Plan:
    """A DELTA plan and its page settings."""

    dense: tuple[int, ...]
    delta: tuple[int, ...]
    budget: int
    recent: int
    page: int = 16


@dataclass(frozen=True)
class Case:
    """Token ids `[T]` of prompt and solution, and the prompt's length."""

    ids: Tensor
    prompt: int


def cases(seeds: range, device: torch.device) -> list[Case]:
    made = []
    for seed in seeds:
        p = make_problem(seed)
        prompt, solution = encode(p.prompt), [*encode(p.solution), EOS_ID]
        made.append(Case(torch.tensor(prompt + solution, device=device), len(prompt)))
    return made


def page_mask(scores: Tensor, first: int, plan: Plan) -> Tensor:
    """Tokens `[R, T]` that sparse layers may read.

    `scores [R, T]` are a Δ-layer's largest weights over the heads, for queries `first ...`.
    """
    rows, t = scores.shape
    pages = -(-t // plan.page)
    padded = F.pad(scores, (0, pages * plan.page - t))
    sums = padded.view(rows, pages, plan.page).sum(-1)
    page = torch.arange(pages, device=sums.device)
    last = (torch.arange(first, first + rows, device=sums.device) // plan.page)[:, None]
    sums = sums.masked_fill(page > last - plan.recent, torch.inf)
    sums = sums.masked_fill(page > last, -torch.inf)
    chosen = sums.topk(min(plan.budget, pages), dim=-1).indices
    mask = torch.zeros_like(sums, dtype=torch.bool).scatter_(1, chosen, True)
    return mask.repeat_interleave(plan.page, dim=1)[:, :t]


def select(q: Tensor, k: Tensor, case: Case, causal: Tensor, plan: Plan) -> Tensor:
    """What each query may read after a Δ-layer `[T, T]`: everything before it, in the prompt."""
    allowed = causal.clone()
    for first in range(case.prompt, q.shape[1], ROWS):
        rows = slice(first, first + ROWS)
        logits = (q[:, rows] @ k.mT) * q.shape[-1] ** -0.5
        weights = logits.masked_fill_(~causal[rows], -torch.inf).softmax(-1)
        allowed[rows] &= page_mask(weights.amax(0), first, plan)
    return allowed


@torch.no_grad()
def solution_loss(model: Llama, case: Case, plan: Plan | None) -> tuple[int, float]:
    """Solution tokens that greedy decoding would get wrong (0: exact), and their mean loss."""
    shape = model.shape
    t = case.ids.shape[0]
    cos, sin = rope_tables(shape, t, case.ids.device)
    causal = torch.ones(t, t, dtype=torch.bool, device=case.ids.device).tril()
    allowed = causal
    groups = shape.num_attention_heads // shape.num_key_value_heads
    x = model.model.embed_tokens(case.ids[None])
    for index, layer in enumerate(model.model.layers):
        q, k, v = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        full = plan is None or index in plan.dense or index in plan.delta
        if plan is not None and index in plan.delta:
            allowed = select(q[0], k[0], case, causal, plan)
        mask = None if full else allowed
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=full)
        x = x + layer.self_attn.o_proj(out.transpose(1, 2).reshape(1, t, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits = model.lm_head(model.model.norm(x))[0, case.prompt - 1 : -1]
    targets = case.ids[case.prompt :]
    wrong = int((logits.argmax(-1) != targets).sum())
    return wrong, float(F.cross_entropy(logits, targets))


def attended_fraction(case: Case, plan: Plan, layers: int) -> float:
    """Share of cache reads over the decode steps, as the statistics of a run count them."""
    n = torch.arange(case.prompt + 1, case.ids.shape[0], dtype=torch.float64)
    partial = (n - 1) % plan.page + 1  # tokens on the last page
    sparse = torch.minimum(n, (plan.budget - 1) * plan.page + partial)
    full = len(plan.dense) + len(plan.delta)
    return float((full * n.sum() + (layers - full) * sparse.sum()) / (layers * n.sum()))


def largest_budget(case: Case, plan: Plan, layers: int, limit: float) -> Plan:
    """The plan with as many pages as the limit on attended tokens allows."""
    budget = plan.recent + 1
    while True:
        wider = Plan(plan.dense, plan.delta, budget + 1, plan.recent, plan.page)
        if attended_fraction(case, wider, layers) > limit:
            return Plan(plan.dense, plan.delta, budget, plan.recent, plan.page)
        budget += 1


def mean_loss(model: Llama, problems: list[Case], plan: Plan) -> float:
    """Mean negative log-likelihood of the solutions under the plan."""
    return sum(solution_loss(model, c, plan)[1] for c in problems) / len(problems)


def search(model: Llama, problems: list[Case], first: Plan, count: int, limit: float) -> Plan:
    """The best plan with `count` full layers: greedy additions, then one-layer exchanges.

    Starts from the Δ-layers of `first` and adds the layer that lowers the loss most until there
    are enough; then moves one Δ-layer at a time while that helps. The first Δ-layer stays: every
    sparse layer needs one before it.
    """
    layers = model.shape.num_hidden_layers
    losses: dict[Plan, float] = {}

    def score(delta: tuple[int, ...]) -> tuple[float, Plan]:
        plan = Plan(first.dense, tuple(sorted(delta)), 0, first.recent, first.page)
        plan = largest_budget(problems[0], plan, layers, limit)
        if plan not in losses:
            losses[plan] = mean_loss(model, problems, plan)
        return losses[plan], plan

    fixed, free = first.delta[:1], first.delta[1:]
    others = range(fixed[0] + 1, layers)
    while len(first.dense) + 1 + len(free) < count:
        added = min((score((*fixed, *free, x)), x) for x in others if x not in free)
        free = (*free, added[1])
        print("greedy", added, flush=True)
    best = score((*fixed, *free))
    improved = True
    while improved:
        improved = False
        for index in range(len(free)):
            for x in others:
                moved = (*free[:index], x, *free[index + 1 :])
                if len(set(moved)) == len(free) and score((*fixed, *moved))[0] < best[0]:
                    best, free, improved = score((*fixed, *moved)), moved, True
        print("exchange", best, flush=True)
    return best[1]


def load(workdir: Path, device: torch.device) -> Llama:
    """The trained model with its weights rounded to bfloat16, as they ship."""
    saved = torch.load(workdir / "checkpoint.pt", map_location="cpu")
    model = Llama(Shape(**saved["shape"]))
    model.load_state_dict({k: v.bfloat16().float() for k, v in saved["model"].items()})
    return model.to(device).eval()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--workdir", type=Path, required=True)
    p.add_argument("--problems", type=int, default=200, help="fresh problems of the final count")
    p.add_argument("--search-problems", type=int, default=4)
    p.add_argument("--limit", type=float, default=0.25, help="largest attended_fraction")
    p.add_argument("--full-layers", type=int, default=4)
    p.add_argument("--page", type=int, default=8)
    p.add_argument("--dense", type=int, nargs="*", default=[])
    p.add_argument("--delta", type=int, nargs="+", default=[0], help="Δ-layers to start from")
    p.add_argument("--recent", type=int, nargs="+", default=[6])
    p.add_argument("--device", default="cuda")
    args = p.parse_args()
    device = torch.device(args.device)
    model = load(args.workdir, device)
    layers = model.shape.num_hidden_layers
    problems = cases(range(FIRST_SEED, FIRST_SEED + args.search_problems), device)
    start = Plan(tuple(args.dense), tuple(args.delta), 0, args.recent[0], args.page)
    found = search(model, problems, start, args.full_layers, args.limit)
    fresh = cases(range(FIRST_SEED + 1000, FIRST_SEED + 1000 + args.problems), device)
    full = [solution_loss(model, c, None)[0] == 0 for c in fresh]
    result: dict[str, object] = {"problems": len(fresh), "full_exact": sum(full) / len(full)}
    print(json.dumps(result), flush=True)
    rows = []
    for recent in args.recent:
        plan = Plan(found.dense, found.delta, 0, recent, found.page)
        plan = largest_budget(problems[0], plan, layers, args.limit)
        exact = [solution_loss(model, c, plan)[0] == 0 for c in fresh]
        same = sum(a == b for a, b in zip(exact, full, strict=True)) / len(full)
        rows.append(
            {
                **asdict(plan),
                "exact": sum(exact) / len(exact),
                "agreement": same,
                "attended_fraction": attended_fraction(fresh[0], plan, layers),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result["plans"] = rows
    (args.workdir / "plan_search.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
