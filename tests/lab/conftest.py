"""Pytest puts the folder of a conftest on the path: ``calibration_cases`` is shared from here."""
