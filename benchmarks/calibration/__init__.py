"""Plans of a model by their loss on texts: ``python -m benchmarks.calibration``."""
