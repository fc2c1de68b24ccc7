"""Calibration of the embedded model: ``python -m benchmarks.calibration``."""
