"""From the data a configuration names to tokenised rows, made once on each machine and opened by its other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit.data import load, store
from align_kit.data.report import TokeniseOptions, TokeniseReport
from align_kit.data.tokenise import tokenise
from align_kit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


RENDERED_BEFORE = (
    "most rows hold control tokens as text; if they were rendered before they came here, give --control_tokens tokens"
)
SEPARATED = (
    "{} hold an end-of-text token as text inside; if it stands between documents there, give --control_tokens tokens"
)


@dataclass
class Wanted:
    """What is asked for: sources to train on and, where `evaluate`, how to come by rows to evaluate on."""

    phase: str
    train: Sequence[Mapping[str, Any]]
    eval: Sequence[Mapping[str, Any]]
    test_split_size: float | None
    evaluate: bool
    seed: int
    options: TokeniseOptions
    cache: Path


@dataclass
class Split:
    """Tokenised rows and the account of them: what the manifest keeps and what a rank needs to open them again."""

    rows: Dataset
    account: dict[str, Any]

    @property
    def report(self) -> TokeniseReport:
        return TokeniseReport(**{k: v for k, v in self.account["tokenised"].items() if k != "mean_tokens"})

    @property
    def warnings(self) -> list[str]:
        found = list(dict.fromkeys(text for one in self.account["sources"] for text in one["warnings"]))
        report = self.report
        if 2 * report.control_rows > report.rows_in:
            found.append(RENDERED_BEFORE)
        elif report.separated_rows:
            found.append(SEPARATED.format(f"{report.separated_rows} of {report.rows_in} rows"))
        return found

    def sentence(self) -> str:
        """Return one line for the header: where the rows came from and what tokenising made of them."""
        names = ", ".join(f"{one['path']} {one['split']}" for one in self.account["sources"])
        return f"{names}: {self.report.sentence()}"


@dataclass
class Prepared:
    """The data of a run."""

    train: Split
    eval: Split | None

    def accounts(self) -> dict[str, Any]:
        """Return the account of each split, plain values only."""
        return {"train": self.train.account} | ({"eval": self.eval.account} if self.eval else {})


def prepare(wanted: Wanted, tokenizer: Any) -> Prepared:
    """Load, mix, render and tokenise what is wanted; tokenised rows come from the cache where they are there.

    Raises `UserError` for every mistake in sources and rows, and where evaluation has nothing to evaluate on.
    """
    loaded = load.load(wanted.train, phase=wanted.phase, seed=wanted.seed)
    train, held_out, held_out_account = loaded.dataset, None, loaded.as_dict()
    if wanted.eval:
        other = load.load(wanted.eval, phase=wanted.phase, split_default="test", seed=wanted.seed)
        held_out, held_out_account = other.dataset, other.as_dict()
    elif wanted.test_split_size:
        train, held_out = load.train_test(train, wanted.test_split_size, wanted.seed)
    if wanted.evaluate and held_out is None:
        raise UserError("eval_strategy asks for evaluation; give eval_datasets or test_split_size")
    made = _split(train, loaded.as_dict(), tokenizer, wanted)
    return Prepared(made, None if held_out is None else _split(held_out, held_out_account, tokenizer, wanted))


def _split(rows: Dataset, account: dict[str, Any], tokenizer: Any, wanted: Wanted) -> Split:
    tokens, report = tokenise(rows, account["kind"], tokenizer, wanted.options, wanted.cache)
    return Split(tokens, {**account, "tokenised": report.as_dict()})


def reopen(accounts: Mapping[str, Any], cache: Path) -> Prepared:
    """Return what another rank of this machine prepared, from its accounts."""
    splits = {name: Split(_stored(account, cache), dict(account)) for name, account in accounts.items()}
    return Prepared(splits["train"], splits.get("eval"))


def _stored(account: Mapping[str, Any], cache: Path) -> Dataset:
    place = cache / account["tokenised"]["digest"]
    found = store.read(place)
    if found is None:
        raise UserError(f"tokenised data is not in {place} on this machine; let ALIGN_KIT_CACHE name a shared folder")
    return found[0]
