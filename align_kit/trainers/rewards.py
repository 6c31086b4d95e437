"""What completions are worth: reward models, Python functions, or a weighted sum of several.

A function is called as TRL calls one, `f(prompts=…, completions=…, completion_ids=…, answer=…) -> list[float]`, and
gives one number for each completion; of the data's other columns nothing is kept. Prompts are as the data has them,
strings or messages; completions are strings, or one assistant message each where prompts are messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from align_kit.data.checkers import as_reward
from align_kit.data.collate import pad_BT
from align_kit.data.functions import RewardFunction, check_finite, function, rewards
from align_kit.data.render import Renderer
from align_kit.data.tokenise import tokenizer_digest
from align_kit.errors import UserError
from align_kit.trainers.base import Known

CHECKER = "checker:"


@dataclass(frozen=True)
class Judged:
    """Completions as judges see them: tokens for a model, text for a function.

    `batch` holds "input_ids" and "attention_mask" of prompt and completion together (B, T, padded on the right).
    """

    prompts: Sequence[Any]  # strings or messages
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    answers: Sequence[Any]
    ended: Sequence[bool]
    batch: Mapping[str, Tensor]


class Judge(Protocol):
    """One reward: its name in the metrics, and what it thinks of completions."""

    name: str

    def __call__(self, policy: nn.Module, judged: Judged) -> Tensor:
        """Return one number for each completion (B, fp32); every rank calls it together."""


class ModelJudge:
    """A reward model, ours or any Hugging Face sequence classifier with one output."""

    def __init__(self, name: str, held: Any, tokenizer: Any = None) -> None:
        """Judge with the frozen model `held`; `tokenizer` is the model's own where it is not the policy's."""
        self.name = name
        self.held = held
        self.tokenizer = tokenizer

    def __call__(self, policy: nn.Module, judged: Judged) -> Tensor:
        batch = judged.batch if self.tokenizer is None else self._retokenised(judged)
        scores_B: Tensor = self.held.scores(policy, batch).float()
        check_finite(f"the reward model {self.name}", scores_B.tolist(), judged.completions)
        return scores_B

    def _retokenised(self, judged: Judged) -> dict[str, Tensor]:
        """Return the same texts in the reward model's own tokens."""
        rows = [self._ids(*one) for one in zip(judged.prompts, judged.completions, judged.ended, strict=True)]
        device = judged.batch["input_ids"].device
        attention_BT = pad_BT([[1] * len(row) for row in rows], 0).to(device)
        return {"input_ids": pad_BT(rows, self.tokenizer.pad_token_id).to(device), "attention_mask": attention_BT}

    def _ids(self, prompt: Any, completion: str, ended: bool) -> list[int]:
        if not isinstance(prompt, str) and self.tokenizer.chat_template:
            turns = [*prompt, {"role": "assistant", "content": completion}]
            return Renderer(self.tokenizer).conversations([{"messages": turns}])[0]
        before = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
        ids = list(self.tokenizer(before + completion)["input_ids"])
        return ids + [self.tokenizer.eos_token_id] * (ended and ids[-1:] != [self.tokenizer.eos_token_id])


class FunctionJudge:
    """A Python function, such as a checker of answers."""

    def __init__(self, name: str, function: RewardFunction) -> None:
        self.name = name
        self.function = function

    def __call__(self, policy: nn.Module, judged: Judged) -> Tensor:
        found = rewards(
            self.name, self.function, prompts=judged.prompts, completions=judged.completions,
            completion_ids=judged.completion_ids, answers=judged.answers,
        )  # fmt: skip
        return torch.tensor(found, dtype=torch.float32)


@dataclass(frozen=True)
class Rewards:
    """A weighted sum of judges."""

    judges: Sequence[Judge]
    weights: Sequence[float]

    def __call__(self, policy: nn.Module, judged: Judged) -> tuple[Tensor, Tensor]:
        """Return the sum (B) and every judge's own numbers (B, judges)."""
        each_BJ = torch.stack([judge(policy, judged).to(judged.batch["input_ids"].device) for judge in self.judges], 1)
        return each_BJ @ torch.tensor(self.weights, dtype=each_BJ.dtype, device=each_BJ.device), each_BJ

    @property
    def names(self) -> list[str]:
        """The judges' names in the metrics; those that share one are numbered."""
        names = [judge.name for judge in self.judges]
        return [name if names.count(name) == 1 else f"{name}_{place}" for place, name in enumerate(names)]


def judge_of(named: str) -> FunctionJudge:
    """Return the judge that an entry of `reward_funcs` names: a dotted path, or `checker:` and a checker's."""
    if named.startswith(CHECKER):
        return FunctionJudge("checker", as_reward(function(named.removeprefix(CHECKER))))
    return FunctionJudge(named.replace(":", ".").rpartition(".")[2], function(named))


def check_named(named: Sequence[str]) -> None:
    """Raise `UserError` for an entry of `reward_funcs` that names no function (the data's checker is not known yet)."""
    for one in named:
        if one != CHECKER.rstrip(":"):
            judge_of(one)


# --- which rewards a run has --------------------------------------------------------------------------------


def reward_source(args: Any, known: Known) -> dict[str, tuple[Any, str]]:
    """Find a reward where none is named: the finished reward run beside this one, else the data's own checker."""
    if args.reward_funcs and "checker" in args.reward_funcs:
        return {"reward_funcs": (_with_checker(args.reward_funcs, known), "as configured, by the data's card")}
    if args.reward_funcs or args.reward_model_name_or_path:
        return {}
    if folder := known.finished("reward"):
        return {"reward_model_name_or_path": ([str(folder)], "the finished reward run")}
    if known.checker:
        return {
            "reward_funcs": (_with_checker(["checker"], known), "no reward is named; the data's card has a checker")
        }
    raise UserError(
        "no reward: give reward_model_name_or_path, or reward_funcs (module:function), or run the reward phase before"
    )


def _with_checker(named: Sequence[str], known: Known) -> list[str]:
    if known.checker is None:
        raise UserError("reward_funcs: checker, but no card of the data names one; give module:function instead")
    return [f"{CHECKER}{known.checker}" if name == "checker" else name for name in named]


def rewards_of(frozen: Mapping[str, Any], args: Any, tokenizer: Any) -> Rewards:
    """Return the weighted sum of the run's reward models and functions, models first."""
    words = tokenizer_digest(tokenizer)
    judges: list[Judge] = []
    for role, held in frozen.items():
        if role.startswith("reward"):
            same = tokenizer_digest(held.tokenizer) == words
            judges.append(ModelJudge(role.replace("reward", "model"), held, None if same else held.tokenizer))
    judges += [judge_of(named) for named in args.reward_funcs or []]
    weights = [1.0] * len(judges) if args.reward_weights is None else args.reward_weights
    if len(weights) != len(judges):
        raise UserError(
            f"reward_weights has {len(weights)} numbers for {len(judges)} rewards "
            f"({', '.join(judge.name for judge in judges)}); give one each"
        )
    return Rewards(judges, weights)
