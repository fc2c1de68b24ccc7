"""Lossless mode beside full attention: equal tokens, acceptance and speed."""
