"""`align-kit compare`: runs that differ in one thing, and what that thing changes, with intervals over seeds."""

from __future__ import annotations

from align_kit.compare.experiment import compare

__all__ = ["compare"]
