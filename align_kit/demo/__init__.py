"""`align-kit demo`: the main job on the embedded default, and a table that shows whether each phase helped."""

from __future__ import annotations

from align_kit.demo.pipeline import demo

__all__ = ["demo"]
