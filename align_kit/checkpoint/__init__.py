"""Checkpoints that verify or do not exist: committed in one piece, kept by a rule, found again after a fault."""
