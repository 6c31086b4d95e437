"""Meters of a run: its progress as it goes, its numbers on disk."""
