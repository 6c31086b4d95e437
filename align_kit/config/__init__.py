"""The configuration of a run: flat names in YAML and on the command line, groups in code, no heavy import."""

from __future__ import annotations

from align_kit.config.batch import BatchPlan, derive, smaller
from align_kit.config.fields import DataFields, DatasetFields, ModelFields, RunFields
from align_kit.config.load import load
from align_kit.config.resolved import Config
from align_kit.config.show import dry_run_text, help_text

__all__ = [
    "BatchPlan",
    "Config",
    "DataFields",
    "DatasetFields",
    "ModelFields",
    "RunFields",
    "derive",
    "dry_run_text",
    "help_text",
    "load",
    "smaller",
]
