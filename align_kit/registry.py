"""The recipes: one row per phase, everything the rest of the house needs to know about it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from align_kit.errors import unknown


@dataclass(frozen=True)
class Recipe:
    """A phase: its trainer and configuration class (dotted, resolved late), its data, its frozen models.

    `needs` names the roles of frozen models; `starts_from` the phases whose finished run it starts from, first
    choice first; `packed` tells that rows are text cut to full length; `unit` is what a batch counts.
    """

    name: str
    trainer: str
    config: str
    unit: str
    starts_from: tuple[str, ...]
    needs: tuple[str, ...] = ()
    packed: bool = False
    summary: str = ""

    def trainer_class(self) -> Any:
        """Import and return the trainer class."""
        module, _, name = self.trainer.partition(":")
        return getattr(importlib.import_module(module), name)


# fmt: off
RECIPES = (
    Recipe("pretrain", "align_kit.trainers.language:Language", "trl:SFTConfig", unit="rows", starts_from=("pretrain",),
           packed=True, summary="next-token prediction on packed text"),
    Recipe("sft", "align_kit.trainers.language:Language", "trl:SFTConfig", unit="rows", starts_from=("pretrain",),
           summary="supervised fine-tuning on prompts and completions"),
    Recipe("dpo", "align_kit.trainers.preference:DPO", "trl:DPOConfig", unit="pairs", starts_from=("sft", "pretrain"),
           needs=("reference",), summary="direct preference optimisation against a frozen reference"),
)
# fmt: on


def names() -> list[str]:
    """Return the names of all recipes in the order of a training pipeline."""
    return [recipe.name for recipe in RECIPES]


def get(name: str) -> Recipe:
    """Return the row `name`; raise `UserError` with the nearest where there is none."""
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    raise unknown("recipe", name, names())
