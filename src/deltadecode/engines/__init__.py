"""Adapters to the engines that people already run; no engine is imported from here."""
