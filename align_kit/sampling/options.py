"""What `align-kit sample` is told."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from align_kit.errors import UserError

REJECTION, BEST, BEST_WORST, MAJORITY, ALL = "rejection", "best", "best-worst", "majority", "all"
# What each way to keep completions can write; the first unless something else is asked for.
WRITES = {
    REJECTION: ("sft", "binary"),
    BEST: ("sft",),
    BEST_WORST: ("preference",),
    MAJORITY: ("sft", "preference", "binary"),
    ALL: ("sft",),
}
WRITTEN_BY = {"sft": REJECTION, "preference": BEST_WORST, "binary": REJECTION}
# How completions are drawn, where it is not said; what was drawn before is drawn already.
DRAWING = {
    "samples": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 512, "seed": 0, "batch_size": 128,
    "workers": None, "dtype": "auto", "trust_remote_code": False, "prompt_template": None,
}  # fmt: skip
DESCRIPTION = """Let a model write several completions of each prompt, judge them, keep those worth training on, and
write them as a data set with a card: demonstrations (sft), pairs (preference) or labelled completions (binary). A
command that was stopped goes on where it was when it is given again."""
KEPT = """rejection: completions that are good enough; best: the best of each prompt; best-worst: pairs of a better and
a worse one; majority: those whose answer most completions of the prompt give; all: every completion that ended"""


@dataclass(frozen=True)
class Asked:
    """A command line, checked."""

    model: str
    prompts: tuple[str, ...]
    drawn_before: Path | None
    output: Path
    name: str
    overwrite: bool
    limit: int | None
    prompt_template: str | None
    samples: int
    temperature: float
    top_p: float
    top_k: int
    length: int
    seed: int
    batch_size: int
    workers: int | None
    dtype: str
    trusted: bool
    checker: str | None
    reward_funcs: tuple[str, ...]
    reward_model: str | None
    answer_of: str | None
    keep: str
    write: str
    at_least: float | None
    margin: float
    agreement: float
    per_prompt: int | None
    reason_template: str | None

    @property
    def judged(self) -> bool:
        """Whether completions get a score: not where all are kept, or where they are judged by a vote."""
        return self.keep not in (ALL, MAJORITY)


def parse(words: Sequence[str]) -> Asked:
    """Return the options on a command line; raises `UserError` for the first mistake."""
    parser = _Parser("align-kit sample", description=DESCRIPTION, allow_abbrev=False)
    _add_source(parser)
    _add_drawing(parser)
    _add_judging(parser)
    _add_keeping(parser)
    given = parser.parse_args(list(words))
    _check_drawing(given)
    vars(given).update({name: usual for name, usual in DRAWING.items() if getattr(given, name) is None})
    keep = given.keep or (WRITTEN_BY[given.write] if given.write else BEST_WORST)
    output = given.output if given.output.name not in ("", "..") else given.output.resolve()  # it gives names
    found = Asked(
        model=given.words[0] if given.words else "", prompts=tuple(given.words[1:]), drawn_before=given.drawn_before,
        output=output, name=given.name or output.name, overwrite=given.overwrite,
        limit=given.max_prompts, prompt_template=given.prompt_template, samples=given.samples,
        temperature=given.temperature, top_p=given.top_p, top_k=given.top_k, length=given.max_new_tokens,
        seed=given.seed, batch_size=given.batch_size,
        workers=given.workers, dtype=given.dtype, trusted=given.trust_remote_code, checker=given.checker,
        reward_funcs=tuple(given.reward_funcs), reward_model=given.reward_model, answer_of=given.answer_of,
        keep=keep, write=given.write or WRITES[keep][0], at_least=given.at_least, margin=given.margin,
        agreement=given.agreement, per_prompt=given.per_prompt, reason_template=given.reason,
    )  # fmt: skip
    _check(found)
    return found


def _check_drawing(given: argparse.Namespace) -> None:
    """Raise `UserError` for options that say how to draw beside completions that were drawn before."""
    named = [f"--{name.replace('_', '-')}" for name in DRAWING if getattr(given, name) is not None]
    if given.drawn_before is not None and named:
        raise UserError(f"--from draws nothing, so nothing can follow {', '.join(named)}; leave that out")


def _check(asked: Asked) -> None:
    """Raise `UserError` for options that do not go together."""
    if asked.drawn_before is not None and asked.model:
        raise UserError("--from takes completions that were drawn before: leave the model and the prompts out")
    if asked.drawn_before is None and not asked.prompts:
        raise UserError("give a model and what it is to answer: align-kit sample runs/sft card:gsm8k --output folder")
    if asked.write not in WRITES[asked.keep]:
        fitting = [keep for keep, writes in WRITES.items() if asked.write in writes]
        raise UserError(
            f"--keep {asked.keep} writes {' or '.join(WRITES[asked.keep])}, not {asked.write}; "
            f"for {asked.write} use --keep {' or '.join(fitting)}"
        )
    judges = [name for name in ("checker", "reward_funcs", "reward_model") if getattr(asked, name)]
    if len(judges) > 1:
        raise UserError(f"--{' and --'.join(name.replace('_', '-') for name in judges)} were given; one judges")
    if judges and not asked.judged:
        raise UserError(f"--{judges[0].replace('_', '-')} is not used by --keep {asked.keep}; drop one")
    if asked.at_least is not None and not asked.judged:
        raise UserError(f"--at-least is not used by --keep {asked.keep}; drop it")
    if asked.answer_of and asked.keep != MAJORITY:
        raise UserError(f"--answer-of is for --keep majority, not {asked.keep}; drop it")
    if asked.reason_template is not None and asked.write == "binary":
        raise UserError("--reason writes traces to imitate (sft) or to prefer (preference), not binary labels; drop it")
    alone = asked.samples == 1 and asked.keep in (BEST, BEST_WORST, MAJORITY)
    if asked.drawn_before is None and alone:
        raise UserError(f"--samples 1 leaves nothing to choose from for --keep {asked.keep}; draw 2 or more")
    if asked.drawn_before is None and asked.temperature == 0 and asked.samples > 1:
        raise UserError("--temperature 0 gives one completion, so --samples must be 1; raise the temperature")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"align-kit sample: {message}; --help lists what it takes")


def _add_source(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("words", nargs="*", metavar="model prompts",
        help="a run's folder or a Hugging Face model; then card:<name> or files with the prompts, with a "
        "split in brackets where it is not train: card:gsm8k[train[:500]]")  # fmt: skip
    add("--output", type=Path, required=True, help="folder to write the data set and its card to")
    add("--from", dest="drawn_before", type=Path, metavar="FOLDER",
        help="choose anew among the completions of a folder this command wrote; nothing is drawn")  # fmt: skip
    add("--name", help="name of the new card; default: the folder's")
    add("--overwrite", action="store_true", help="replace a set that align-kit wrote to the folder")
    add(*both("--prompt-template"), metavar="chat|TEXT", help="what string prompts become: a user's turn of the "
        "model's chat template, or a text that holds {prompt}; default: what their card says, or as they stand",
    )  # fmt: skip
    add(*both("--max-prompts"), type=_count, metavar="N", help="take the first N prompts")


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--samples", "-n", type=_count, metavar="N", help="completions of each prompt (4)")
    add("--temperature", type=_not_negative, help="of the distribution drawn from; 0: the likeliest (1)")
    add(*both("--top-p"), type=_share, help="draw from the likeliest tokens with this mass together (1)")
    add(*both("--top-k"), type=_natural, help="draw from the K likeliest tokens; 0: from all (0)")
    add(*both("--max-new-tokens"), type=_count, metavar="N", help="longest completion (512)")
    add("--seed", type=_natural, help="what is drawn is a function of it, the prompt and the model (0)")
    add(*both("--batch-size"), type=_count, metavar="N",
        help="completions computed together; halved where they do not fit the device (128)")  # fmt: skip
    add("--workers", type=_count, metavar="N", help="processes; default: one for each accelerator, else for each core")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"),
        help="precision of the weights; auto: bfloat16 on an accelerator, float32 on a CPU")  # fmt: skip
    add(*both("--trust-remote-code"), action="store_true", default=None, help="run the code that a model brings")


def _add_judging(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checker", metavar="MODULE:FUNCTION", help="check(prompt, completion, answer) -> number or verdict; default: "
        "the one the prompts' card names")  # fmt: skip
    add(*both("--reward-funcs"), nargs="+", default=(), metavar="MODULE:FUNCTION", help="reward functions as ppo takes "
        "them, f(prompts=..., completions=..., answer=...) -> numbers, summed")  # fmt: skip
    add(*both("--reward-model"), metavar="FOLDER", help="the output of a reward run, or any classifier with one label")
    add(*both("--answer-of"), metavar="MODULE:FUNCTION",
        help="answer_of(completion) -> text or None, for the vote; default: the number after ####")  # fmt: skip


def _add_keeping(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--keep", choices=tuple(WRITES), help=f"{' '.join(KEPT.split())} (best-worst)")
    add("--write", choices=tuple(WRITTEN_BY), help="what is written; default: what --keep is for")
    add(*both("--at-least"), type=_number, metavar="SCORE", help="the score from which a completion is good; default: "
        "a right answer, where a checker judges")  # fmt: skip
    add("--margin", type=_not_negative, default=0.0, metavar="X", help="chosen scores more than X above rejected (0)")
    add("--agreement", type=_share, default=0.5, metavar="X", help="share of a prompt's answers a majority needs (0.5)")
    add(*both("--per-prompt"), type=_count, metavar="N", help="most rows of one prompt (1; all and binary: no limit)")
    add("--reason", nargs="?", const="", metavar="TEMPLATE", help="keep chain of thought and answer apart; default: "
        r"<think>\n{reasoning}\n</think>\n\n{answer}")  # fmt: skip


def both(option: str) -> tuple[str, str]:
    """Return an option as it is spelt here and as Hugging Face spells it."""
    return option, f"--{option[2:].replace('-', '_')}"


def _checked(text: str, kind: type[int] | type[float], fits: bool, allowed: str) -> float:
    if not fits:
        raise argparse.ArgumentTypeError(f"{text} does not fit; give {allowed}")
    return kind(text)


def _value(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # fits nowhere


def _count(text: str) -> int:
    return int(_checked(text, int, text.isdecimal() and int(text) > 0, "a whole number, 1 or more"))


def _natural(text: str) -> int:
    return int(_checked(text, int, text.isdecimal(), "a whole number, 0 or more"))


def _number(text: str) -> float:
    return _checked(text, float, math.isfinite(_value(text)), "a number")


def _not_negative(text: str) -> float:
    return _checked(text, float, 0 <= _value(text) < math.inf, "a number, 0 or more")


def _share(text: str) -> float:
    return _checked(text, float, 0 < _value(text) <= 1, "a share above 0, at most 1")
