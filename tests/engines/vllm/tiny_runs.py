"""Prompts and a plan that runs of tiny random models share."""

PROMPTS = [
    [5 + 7 * (place % 9) % 50 for place in range(60)],
    [3 + 11 * place % 59 for place in range(41)],
]
# Sparse layers read three of five to thirteen pages: 24 tokens.
SPARSE = {
    "page_size": 8, "budget_pages": 3, "recent_pages": 1, "sink_pages": 1,
    "dense_layers": [0], "delta_layers": [1],
}  # fmt: skip
