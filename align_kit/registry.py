"""The recipes: one row per phase, everything the rest of the house needs to know about it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from align_kit import imports
from align_kit.errors import unknown


@dataclass(frozen=True)
class Recipe:
    """A phase: its trainer and configuration class (dotted, resolved late), its data, its frozen models.

    `needs` names the roles of frozen models; `starts_from` the phases whose finished run it starts from, first
    choice first; `packed` tells that rows are text cut to full length; `unit` is what a batch counts; `head` is what
    the model ends in: "lm" or one scalar, "score"; `values` tells that a value function is trained beside the policy;
    `repeats` names the options that say how often an epoch trains on a row, `writes` the one that says how many
    tokens the policy writes to a prompt.
    """

    name: str
    trainer: str
    config: str
    unit: str
    starts_from: tuple[str, ...]
    needs: tuple[str, ...] = ()
    packed: bool = False
    head: Literal["lm", "score"] = "lm"
    values: bool = False
    repeats: tuple[str, ...] = ()
    writes: str = ""
    summary: str = ""

    def trainer_class(self) -> Any:
        """Import and return the trainer class."""
        module, _, name = self.trainer.partition(":")
        with imports.uncollected():
            return getattr(importlib.import_module(module), name)


# fmt: off
RECIPES = (
    Recipe("pretrain", "align_kit.trainers.language:Language", "trl:SFTConfig", unit="rows", starts_from=("pretrain",),
           packed=True, summary="next-token prediction on packed text"),
    Recipe("sft", "align_kit.trainers.language:Language", "trl:SFTConfig", unit="rows", starts_from=("pretrain",),
           summary="supervised fine-tuning on prompts and completions"),
    Recipe("reward", "align_kit.trainers.reward:Reward", "trl:RewardConfig", unit="pairs",
           starts_from=("sft", "pretrain"), head="score", summary="reward model: one score, from preference pairs"),
    Recipe("dpo", "align_kit.trainers.preference:DPO", "trl:DPOConfig", unit="pairs", starts_from=("sft", "pretrain"),
           needs=("reference",), summary="direct preference optimisation against a frozen reference"),
    Recipe("orpo", "align_kit.trainers.preference:ORPO", "align_kit.trainers.arguments:ORPOConfig", unit="pairs",
           starts_from=("pretrain", "sft"), summary="odds-ratio preference optimisation, without a reference"),
    Recipe("kto", "align_kit.trainers.unpaired:KTO", "trl:KTOConfig", unit="completions",
           starts_from=("sft", "pretrain"), needs=("reference",), summary="good and bad completions, without pairs"),
    Recipe("ppo", "align_kit.trainers.ppo:PPO", "align_kit.trainers.arguments:PPOConfig", unit="completions",
           starts_from=("sft", "pretrain"), needs=("reference", "reward"),
           values=True, repeats=("num_generations", "num_ppo_epochs"), writes="response_length",
           summary="RLHF: the policy writes, rewards judge, PPO learns"),
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
