"""`align-kit data preferences`: what a set of preferences is worth, and the set without what teaches nothing."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from align_kit import log
from align_kit.data import weights
from align_kit.data.digest import rows_digest
from align_kit.data.made import MadeSet, check_free, check_name, write_made
from align_kit.data.shapes import Row
from align_kit.errors import UserError
from align_kit.preferences import filters, findings, options, report
from align_kit.preferences.facts import SIDES, Facts, Gather, score_like, vote_like
from align_kit.preferences.filters import KEPT, Decision
from align_kit.preferences.source import Source, open_source
from align_kit.preferences.votes import Annotators
from align_kit.preferences.waiting import watched

PHASES = {"preference": ("dpo", "orpo", "reward", "kto"), "binary": ("kto",), "prompt_completion": ("sft",)}


@dataclass(frozen=True)
class Studied:
    """A source, the facts of its rows, their digest, what they say together, and which rows are dropped."""

    source: Source
    facts: Facts
    digest: str
    found: findings.Section
    decision: Decision
    scorer: str | None = None  # digest of the reward model


def preferences(words: Sequence[str]) -> int:
    """Carry out `align-kit data preferences …` and return its exit code; raises `UserError` for the user's mistakes."""
    given = options.parse(words)
    if given.output:
        check_name(_name(given))
        check_free(given.output, overwrite=given.overwrite)
    with closing(open_source(given.source, format=given.format, columns=given.columns)) as source:
        for warning in source.warnings:
            log.warn(warning)
        studied = _study(source, given)
        _tell(studied, given)
        if given.output:
            card = _write(studied, given, words)
            if not given.json:
                split = "" if source.name == "train" else f", split: {source.name}"
                log.say(f"\n{studied.decision.kept:,} rows: {card}; use them with {{path: {card}{split}}} in datasets")
    return 0


def _study(source: Source, given: argparse.Namespace) -> Studied:
    """Read all rows and say what is found and what is dropped."""
    wanted = options.wanted(given)
    annotators = Annotators(given.annotators) if given.annotators else None
    facts, digest = _read(source, annotators, given.reward_scores or ())
    for name in annotators.silent() if annotators else ():
        log.warn(f"{source.where}: column {name} holds no vote")
    scored = bool(given.reward_scores or given.reward_model)
    if given.reward_model:
        _check_model_fits(facts)
    filters.check(wanted, facts, voted=annotators is not None, scored=scored)
    scorer = _score(source, facts, given.reward_model) if given.reward_model else None
    near = wanted.near or options.NEAR
    found = findings.all_of(facts, given.level, near=near, seed=given.seed, voted=bool(annotators), scored=scored)
    return Studied(source, facts, digest, found, filters.decide(facts, wanted), scorer)


def _read(source: Source, annotators: Annotators | None, scores: Sequence[str]) -> tuple[Facts, str]:
    """Return the facts of all rows, and the digest of their canonical forms."""
    gather = Gather(source.kind, annotators, scores)

    def noted() -> Iterator[Row]:
        rows = watched(source.canonical(), len(source.rows), "reading")
        for number, (row, canonical) in enumerate(rows, start=1):
            try:
                gather.add(row, canonical)
            except UserError as error:
                raise UserError(f"{source.place(number)}: {error}") from None
            yield canonical

    digest = rows_digest(noted())
    return gather.done(), digest


def _check_model_fits(facts: Facts) -> None:
    """Raise `UserError` where a reward model's scores have nothing to be held against, or no column to go to."""
    if facts.kind == "prompt_completion":
        raise UserError("--reward-model is held against labels, and these rows have none; give pairs or labels")
    for side in SIDES[facts.kind]:
        if f"score_{side}" in facts.columns:
            raise UserError(
                f"--reward-model writes a column `score_{side}`, which these rows have already; rename theirs, or take "
                "their scores by --reward-scores"
            )


def _score(source: Source, facts: Facts, model: str) -> str:
    """Fill in the scores of a reward model and return its digest."""
    from align_kit.preferences.scoring import Scorer

    scorer = Scorer(model)
    rows = (row for _, row in source.canonical())
    for scores in watched(scorer.scores(rows, SIDES[facts.kind]), len(facts), "scoring"):
        for score, column in zip(scores, facts.scores, strict=False):
            column.append(score)
    return scorer.digest


def _tell(studied: Studied, given: argparse.Namespace) -> None:
    if given.json:
        steps = [step._asdict() for step in studied.decision.steps]
        whole = {"source": studied.source.where, **studied.found, "steps": steps, "kept": studied.decision.kept}
        log.say(json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False))
        return
    written = bool(given.output and studied.decision.kept)
    log.say(report.markdown(studied.source.where, studied.found, studied.decision, written=written))
    columns = studied.facts.columns
    if (votes := vote_like(columns)) and not given.annotators:
        log.say(f"\nThese columns look like votes: --annotators {','.join(votes)}")
    if (scores := score_like(columns)) and not (given.reward_scores or given.reward_model):
        log.say(f"\nThese columns look like scores: --reward-scores {','.join(scores)}")


def _write(studied: Studied, given: argparse.Namespace, words: Sequence[str]) -> Path:
    """Write the rows that are kept, and return their card; raises `UserError` where none is."""
    rows, decision = len(studied.facts), studied.decision
    if not decision.kept:
        worst = max(decision.steps, key=lambda step: step.dropped)
        raise UserError(
            f"all {rows:,} rows would be dropped, {worst.dropped:,} of them by {worst.name} ({worst.rule}), so nothing "
            "was written; loosen that filter"
        )
    with tempfile.TemporaryDirectory() as scratch:
        aside = Path(scratch) / options.DROPPED
        with aside.open("w", encoding="utf-8") as dropped:
            kept = _kept(studied, dropped if given.keep_dropped else None)
            made = _made(studied, given, words)
            beside = {options.DROPPED: aside} if given.keep_dropped else {}
            return write_made(given.output, made, {studied.source.name: kept}, overwrite=given.overwrite, beside=beside)


def _kept(studied: Studied, dropped: IO[str] | None) -> Iterator[Row]:
    """Yield the rows that are kept as they stood in the source, with what was asked for beside; write the others."""
    rules = {step.name: step.rule for step in studied.decision.steps}
    for place, row in enumerate(studied.source.rows):
        reason = studied.decision.reasons[place]
        row = {name: _storable(value) for name, value in row.items()} | _beside(studied, place)
        if reason == KEPT:
            yield row
        elif dropped:
            where = f"{studied.source.where}, row {place + 1}"
            said = {"reason": reason, "rule": rules[reason], "where": where, "row": row}
            dropped.write(json.dumps(said, ensure_ascii=False, default=str) + "\n")
    if dropped:
        dropped.flush()


def _beside(studied: Studied, place: int) -> Row:
    """Return the columns that a row gets: its weight, its scores by the reward model."""
    beside: Row = {}
    if studied.decision.weights is not None:
        beside["weight"] = studied.decision.weights[place]
    if studied.scorer is not None:
        for side, scores in zip(SIDES[studied.facts.kind], studied.facts.scores, strict=False):
            beside[f"score_{side}"] = _storable(scores[place])
    return beside


def _storable(value: Any) -> Any:
    """Return a cell as JSON can hold it: no number, where a table has NaN, is null."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _name(given: argparse.Namespace) -> str:
    return str(given.name or given.output.resolve().name)


def _made(studied: Studied, given: argparse.Namespace, words: Sequence[str]) -> MadeSet:
    source, found = studied.source, studied.found
    card = source.card.block if source.card else None
    filtered = [
        {"name": step.name, "rule": step.rule, "threshold": step.threshold, "dropped": step.dropped}
        for step in studied.decision.steps
    ]
    by_weight = given.weight_by and not given.resample and found["kind"] in weights.KINDS
    weighed = {weights.COLUMN: weights.COLUMN} if by_weight else {}
    facts = {"alpha": (found.get("agreement") or {}).get("alpha"), "reward_model": studied.scorer}
    return MadeSet(
        name=_name(given),
        pretty_name=f"{source.card.pretty_name if source.card else Path(source.path).name}, filtered",
        licences=source.licences or ("unknown",),
        phases=card.phases if card else PHASES[found["kind"]],
        format=source.shape.format,
        columns=source.shape.columns | weighed,
        prompt_template=source.shape.prompt_template,
        reason_template=source.shape.reason_template,
        checker=card.checker if card else None,
        filters=filtered,
        made={
            "command": ["align-kit", "data", "preferences", *words],
            "seed": given.seed,
            "from": [{**source.origin, "split": source.split, "digest": studied.digest, "rows": found["rows"]}],
            **{name: value for name, value in facts.items() if value is not None},
        },
    )
