"""What `align-kit data preferences` is told."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from align_kit.errors import UserError, unknown
from align_kit.preferences.alpha import Scale
from align_kit.preferences.filters import STANDING, Wanted

NEAR = 0.9  # similarity of both sides from which a pair is reported as nearly equal
DROPPED = "dropped.jsonl"
DESCRIPTION = """Report on a set of preferences: how far its annotators agree, whether length gives the labels away, how
alike the sides are, what scores say, how many labels may be flipped. With --output, write the rows that are worth
training on, and a card that says what was dropped and why."""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the options on a command line, each checked on its own; raises `UserError` for the first mistake."""
    parser = _Parser("align-kit data preferences", description=DESCRIPTION, allow_abbrev=False)
    _name_source(parser)
    _ask_for_figures(parser)
    _ask_for_filters(parser)
    given = parser.parse_args(list(words))
    for reason in given.keep:
        if reason not in STANDING:
            raise unknown("reason in --keep", reason, STANDING)
    if given.keep_dropped and not given.output:
        raise UserError("--keep-dropped writes beside the rows that are kept; add --output folder")
    if given.reward_scores and given.reward_model:
        raise UserError("--reward-scores and --reward-model were both given; drop one")
    return given


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"align-kit data preferences: {message}; --help lists what it takes")


def _name_source(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="card:<name> or a file, with a split in brackets where it is not train: card:gsm8k[test]")
    add("--output", type=Path, help="folder to write the kept rows and their card to; without it only the report")
    add("--format", help="shape of the rows, where their columns do not show it: preference, binary, sharegpt, ...")
    add("--columns", type=_columns, metavar="A=B,...", help="canonical=own names: prompt=question,chosen=best,...")
    add("--name", help="name of the new card; default: the folder's")
    add("--overwrite", action="store_true", help="replace a set that align-kit wrote to the folder")
    add("--keep-dropped", action="store_true", help=f"write what is dropped to {DROPPED}, each row with its reason")


def _ask_for_figures(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--annotators", type=_list, metavar="COL,...", help="columns with a vote each, or one with lists of votes")
    add("--level", type=_scale, default=Scale(), metavar="LEVEL",
        help="what votes are: nominal, interval, ordinal (numbers), or ordinal:low,middle,high (words)")  # fmt: skip
    add("--reward-scores", type=_list, metavar="COL,COL", help="columns with the chosen and the rejected side's score; "
        "one for labelled completions")  # fmt: skip
    add("--reward-model", metavar="FOLDER", help="reward model to score both sides by, such as the output of a reward "
        "run; scores are written with the rows")  # fmt: skip
    add("--json", action="store_true", help="print the report as JSON")
    add("--seed", type=int, default=0, help="of intervals and of --resample (0)")


def _ask_for_filters(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--agreement", type=_share, metavar="X", help="drop rows of which less than this share of votes agree, 0 to 1")
    add("--weight-by", choices=["agreement"], help="write that share as a column `weight`, by which "
        "reward, dpo, orpo and kto count a row in their loss")  # fmt: skip
    add("--resample", action="store_true", help="keep rows by chance, in proportion to their weight, instead of "
        "counting them by it")  # fmt: skip
    add("--drop-ties", action="store_true", help="drop rows without a most common vote, or with equal scores")
    add("--reward-margin", type=_finite, metavar="X", help="drop pairs whose chosen side is not scored higher by X")
    add("--max-length-ratio", type=_ratio, metavar="X", help="drop pairs with a side more than X times as long")
    add("--near", type=_share, metavar="X", help=f"drop pairs whose sides are at least this similar (reported: {NEAR})")
    add("--keep", type=_list, default=[], metavar="REASON,...",
        help=f"do not drop rows for one of these, as is done unasked: {', '.join(STANDING)}")  # fmt: skip


def wanted(given: argparse.Namespace) -> Wanted:
    """Return what the filters are asked for."""
    return Wanted(
        agreement=given.agreement,
        weight_by=given.weight_by,
        resample=given.resample,
        drop_ties=given.drop_ties,
        max_length_ratio=given.max_length_ratio,
        reward_margin=given.reward_margin,
        near=given.near,
        keep=tuple(given.keep),
        seed=given.seed,
    )


def _list(text: str) -> list[str]:
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise argparse.ArgumentTypeError("it names nothing")
    return found


def _number(text: str, fits: bool, allowed: str) -> float:
    if not fits:
        raise argparse.ArgumentTypeError(f"{text} does not fit; give {allowed}")
    return float(text)


def _as_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # fits nowhere


def _finite(text: str) -> float:
    return _number(text, math.isfinite(_as_float(text)), "a number")


def _share(text: str) -> float:
    return _number(text, 0 < _as_float(text) <= 1, "a share above 0, at most 1")


def _ratio(text: str) -> float:
    return _number(text, 1 <= _as_float(text) < math.inf, "how many times as long as the shorter side, 1 or more")


def _columns(text: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in _list(text)]
    if not all(name and column for name, _, column in pairs):
        raise argparse.ArgumentTypeError(f"{text} does not fit; write canonical=own, as in prompt=question,chosen=best")
    return {name: column for name, _, column in pairs}


def _scale(text: str) -> Scale:
    level, _, order = text.partition(":")
    return Scale(level, tuple(word.strip().casefold() for word in order.split(",") if word.strip()))
