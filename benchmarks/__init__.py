"""Measurements of DELTA beside its peers, in one run and on one machine."""
