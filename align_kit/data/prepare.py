"""From the data a configuration names to tokenised rows, made once on each machine and opened by its other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit.data import health, load, mixture, store, weights
from align_kit.data.origins import Origins
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
    temperature: float | None = None  # of the mixture to train on; see `load`
    limits: Mapping[str, float] = field(default_factory=dict)  # `health.judged`
    test_split_seed: int | None = None  # draws the rows to evaluate on; None: `seed`

    @property
    def held_out_seed(self) -> int:
        """What draws the rows to evaluate on."""
        return self.seed if self.test_split_seed is None else self.test_split_seed


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
        found += self.account.get("suspicions", [])
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

    def mixture(self) -> list[str]:
        """Return a line for each source of a mixture: asked and realised share, epochs, rows never seen."""
        return mixture.lines(self.account["sources"])

    def weights(self) -> str | None:
        """Return a line on how much rows count, None where all count the same."""
        return weights.sentence(self.rows)

    def source_names(self) -> list[str]:
        """Return a name for each source: its path, with the split where another source has that path too."""
        paths = [one["path"] for one in self.account["sources"]]
        return [one["path"] if paths.count(one["path"]) == 1 else f"{one['path']} {one['split']}"
                for one in self.account["sources"]]  # fmt: skip


@dataclass
class Prepared:
    """The data of a run."""

    train: Split
    eval: Split | None
    labels: str = ""  # what of the rows is trained, and whether they end; of the rank that speaks

    def accounts(self) -> dict[str, Any]:
        """Return the account of each split, plain values only."""
        return {"train": self.train.account} | ({"eval": self.eval.account} if self.eval else {})


def prepare(wanted: Wanted, tokenizer: Any) -> Prepared:
    """Load, mix, render and tokenise what is wanted; tokenised rows come from the cache where they are there.

    Raises `UserError` for every mistake in sources and rows, and where evaluation has nothing to evaluate on.
    """
    return tokenised(given(wanted), wanted, tokenizer)


@dataclass(frozen=True)
class Given:
    """Canonical rows, as they are before they are tokenised, and the account of where they come from."""

    rows: Dataset
    account: dict[str, Any]
    origins: Origins | None = None  # of each row, where they are to be told apart in training


def given(wanted: Wanted) -> dict[str, Given]:
    """Load and mix what is wanted: the rows to train on and, where there are any, those to evaluate on, by split."""
    loaded = load.load(wanted.train, phase=wanted.phase, seed=wanted.seed, temperature=wanted.temperature)
    train, held_out, held_out_account = loaded.dataset, None, loaded.as_dict()
    if wanted.eval:
        other = load.load(wanted.eval, phase=wanted.phase, split_default="test", seed=wanted.held_out_seed)
        held_out, held_out_account = other.dataset, other.as_dict()
    elif wanted.test_split_size:
        _refuse_repeats(loaded)
        train, held_out = load.train_test(train, wanted.test_split_size, wanted.held_out_seed)
    if wanted.evaluate and held_out is None:
        raise UserError("eval_strategy asks for evaluation; give eval_datasets or test_split_size")
    if held_out is not None and weights.COLUMN in held_out.column_names:
        held_out = held_out.remove_columns(weights.COLUMN)
    found = {"train": Given(train, loaded.as_dict(), _origins(loaded, wanted))}
    return found | ({} if held_out is None else {"eval": Given(held_out, held_out_account)})


def tokenised(splits: Mapping[str, Given], wanted: Wanted, tokenizer: Any) -> Prepared:
    """Render and tokenise the rows of each split, and judge those to train on."""
    made = {name: _split(one, tokenizer, wanted) for name, one in splits.items()}
    return Prepared(_judged(made["train"], wanted), made.get("eval"))


def _judged(split: Split, wanted: Wanted) -> Split:
    """Return rows to train on with what is suspicious about them in their account; refuse those that are too many."""
    where = ", ".join(one["path"] for one in split.account["sources"])
    found = health.judged(split.report, wanted.limits, where, health.repeats_asked(split.account))
    return Split(split.rows, {**split.account, "suspicions": found})


def _refuse_repeats(loaded: load.Loaded) -> None:
    for source in loaded.sources:
        if source.rows > source.rows_read:
            raise UserError(
                f"{source.path}: epochs repeats its rows, so test_split_size would hold out rows that are trained on; "
                "give eval_datasets instead"
            )


def _origins(loaded: load.Loaded, wanted: Wanted) -> Origins | None:
    """Return whose each row to train on is; None of a single source."""
    from datasets import Dataset

    if len(loaded.sources) == 1:
        return None
    numbers = loaded.origins
    if wanted.test_split_size and not wanted.eval:
        rows = Dataset.from_dict({"source": numbers})
        numbers = load.train_test(rows, wanted.test_split_size, wanted.held_out_seed)[0]["source"][:]
    return Origins(tuple(numbers), len(loaded.sources))


def _split(one: Given, tokenizer: Any, wanted: Wanted) -> Split:
    tokens, report = tokenise(one.rows, one.account["kind"], tokenizer, wanted.options, wanted.cache, one.origins)
    return Split(tokens, {**one.account, "tokenised": report.as_dict()})


def reopen(accounts: Mapping[str, Any], cache: Path) -> Prepared:
    """Return what another rank of this machine prepared, from its accounts."""
    splits = {name: Split(_stored(account, cache), dict(account)) for name, account in accounts.items()}
    return Prepared(splits["train"], splits.get("eval"))


def _stored(account: Mapping[str, Any], cache: Path) -> Dataset:
    place = cache / account["tokenised"]["place"]
    found = store.read(place)
    if found is None:
        raise UserError(f"tokenised data is not in {place} on this machine; let ALIGN_KIT_CACHE name a shared folder")
    return found[0]
