"""Names of what a report's folder holds; known without loading what draws it."""

FIGURE_FILES = (
    "shift.png",
    "recall.png",
    "layers.png",
    "drift.png",
    "map.png",
    "entropy.png",
    "sinks.png",
)
