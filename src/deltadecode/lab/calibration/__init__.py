"""Layer plans from measurements: what full attention attends to, and where it changes.

``deltadecode calibrate`` is its command line; docs/calibration.md says what is measured and how.
"""
