"""Python functions a user names by a dotted path: how they are found, called, and held to what they must give."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align_kit.errors import UserError

RewardFunction = Callable[..., Sequence[float]]


def function(dotted: str, option: str = "reward_funcs") -> Callable[..., Any]:
    """Return the function that `module:name` or `module.name` names; modules in the working directory are found too.

    Raises `UserError`, naming `option`, where there is none or its module cannot be imported.
    """
    module, _, name = dotted.replace(":", ".").rpartition(".")
    if not module:
        raise UserError(f"{option}: {dotted!r} names no module; give module:function, such as rewards:length")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"{option}: {dotted!r} cannot be imported ({error}); is its folder on PYTHONPATH?") from None
    except Exception as error:  # whatever a module does while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{option}: {dotted!r} cannot be imported ({reason}); mend its module") from None
    if not callable(found):
        raise UserError(f"{option}: {module} has no function {name!r}; check the name")
    return found  # type: ignore[no-any-return]


def rewards(
    name: str,
    reward: RewardFunction,
    *,
    prompts: Sequence[Any],
    completions: Sequence[str],
    answers: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> list[float]:
    """Return what a reward function gives for each completion, called as TRL calls one.

    Prompts are strings or messages; where they are messages, a completion is shown as one assistant message. Raises
    `UserError` for a function that cannot be called so, or that does not give one finite number for each completion.
    """
    shown: Mapping[str, Sequence[Any]] = {
        "prompts": prompts,
        "completions": completions
        if not prompts or isinstance(prompts[0], str)
        else [[{"role": "assistant", "content": text}] for text in completions],
        "answer": answers,
        **({} if completion_ids is None else {"completion_ids": completion_ids}),
    }
    _check_call(name, reward, shown)
    scores = _numbers(name, reward(**shown), len(completions))
    check_finite(f"the reward function {name}", scores, completions)
    return scores


def _check_call(name: str, reward: RewardFunction, shown: Mapping[str, Any]) -> None:
    """Tell a function that takes other arguments from one that fails inside, whose author needs the place."""
    try:
        inspect.signature(reward).bind(**shown)
    except TypeError as error:
        raise UserError(
            f"the reward function {name} cannot be called ({error}); it is given {', '.join(shown)} by name: "
            "let it take those it reads, and **kwargs"
        ) from None


def _numbers(name: str, given: Any, count: int) -> list[float]:
    try:
        scores = [float(score) for score in given]
    except (TypeError, ValueError):
        raise UserError(f"the reward function {name} gave {given!r:.80}; it must give a list of numbers") from None
    if len(scores) != count:
        raise UserError(
            f"the reward function {name} gave {len(scores)} numbers for {count} completions; it must give one each"
        )
    return scores


def check_finite(who: str, scores: Sequence[float], completions: Sequence[str]) -> None:
    """Raise `UserError` where a score is no finite number, with the completion it was given for."""
    broken = next((row for row, score in enumerate(scores) if not math.isfinite(score)), None)
    if broken is not None:
        raise UserError(f"{who} gave {scores[broken]} for {completions[broken]!r:.80}; every reward must be finite")
