"""`align-kit sample`: a model's own completions, judged and kept, as data to train on."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit import imports, log
from align_kit.data import made
from align_kit.data.shapes import Row
from align_kit.errors import UserError
from align_kit.sampling import choosing, journal, options, prompts, told
from align_kit.sampling.options import MAJORITY, Asked
from align_kit.sampling.prompts import Prompts, key_of

if TYPE_CHECKING:
    from align_kit.sampling.judging import Judge


@dataclass(frozen=True)
class Answered:
    """Prompts and their completions; `drawn_as` says by which model, how, and where the prompts come from."""

    rows: Sequence[Row]
    drawn: Sequence[Sequence[Any]]
    drawn_as: Mapping[str, Any]
    others: int = 0  # prompts in the journal that were asked for before, and are not now


def sample(words: Sequence[str]) -> int:
    """Carry out `align-kit sample …` and return its exit code; raises `UserError` for the user's mistakes.

    What was drawn when it is stopped is kept beside the output, and the same command goes on from there.
    """
    asked = options.parse(words)
    log.quiet()
    made.check_free(asked.output, overwrite=asked.overwrite)
    made.check_name(asked.name)
    _answer_of(asked)
    if asked.reason_template is not None:
        choosing.template_of(asked.reason_template)
    scratch = Path(f"{asked.output}.drawn")
    with _ending_well(scratch):
        answered = _drawn_before(asked) if asked.drawn_before else _answered(asked, scratch)
        card = _kept(asked, answered, words)
    if answered.others:
        log.say(f"{scratch} holds completions of {answered.others:,} other prompts still; remove it if none is wanted")
    elif asked.drawn_before is None:  # else a journal there is another command's
        journal.remove(scratch)
    log.say(f"train on it: --datasets {shlex.quote(json.dumps([{'path': str(card)}]))}")
    return 0


def _answered(asked: Asked, scratch: Path) -> Answered:
    """Draw the completions of all prompts; what can be said against the judge is said before."""
    from align_kit.models.completion import Drawing

    with imports.uncollected():
        from align_kit.models import source
        from align_kit.sampling import drawing

    found = prompts.read(asked.prompts, asked.limit, asked.prompt_template)
    for warning in found.warnings:
        log.warn(warning)
    _judge(asked, found.checker, found.rows)
    teacher = source.resolve(asked.model, option="the model")
    if teacher.head != "lm":
        raise UserError(f"{asked.model} gives scores, not words; give a language model")
    how = Drawing(asked.samples, asked.temperature, asked.top_p, asked.top_k, asked.length, asked.seed)
    name = Path(teacher.name).name if Path(teacher.name).expanduser().is_dir() else teacher.name
    rows, ids, words = _tokens(asked, found.rows, teacher)
    dtype = drawing.precision(asked.dtype)
    drawn_as = {"model": name, "model_digest": source.digest(teacher), "tokenizer_digest": words, "dtype": dtype}
    drawn_as |= _named(how)
    with journal.opened(scratch, drawn_as) as done:
        work = drawing.Work(
            asked.model, {key_of(row): one for row, one in zip(rows, ids, strict=True)}, how, asked.batch_size,
            dtype, asked.trusted, asked.workers,
        )  # fmt: skip
        before = sum(key in done.found for key in work.prompts)
        log.say(
            f"{len(rows):,} prompts, {how.samples} completions each by {name} ({drawn_as['model_digest'][:16]})"
            + (f"; {before:,} prompts are answered already" if before else "")
        )
        drawing.drawn(work, done)
        drawn = [done.found[key_of(row)] for row in rows]
    unasked = {told.REPEATED_PROMPTS: found.repeated, told.NO_ROOM: len(found.rows) - len(rows)}
    counts = {name: count for name, count in unasked.items() if count}
    others = len(done.found.keys() - work.prompts.keys())
    return Answered(rows, drawn, {**drawn_as, **_sources(found), "unasked": counts}, others)


def _named(how: Any) -> dict[str, Any]:
    named = {"samples": how.samples, "temperature": how.temperature, "max_new_tokens": how.length, "seed": how.seed}
    return {**named, "top_p": how.top_p, "top_k": how.top_k}


def _sources(found: Prompts) -> dict[str, Any]:
    return {"from": list(found.origins), "licences": list(found.licences), "checker": found.checker}


def _tokens(asked: Asked, rows: Sequence[Row], teacher: Any) -> tuple[list[Row], list[list[int]], str]:
    """Return the prompts the model has room to answer, their tokens, and the digest of what made those."""
    from transformers import AutoConfig

    from align_kit.data.render import Renderer
    from align_kit.data.tokenise import tokenizer_digest
    from align_kit.models import load

    tokenizer = load.load_tokenizer(teacher, trust_remote_code=asked.trusted)
    if tokenizer.chat_template and isinstance(rows[0]["prompt"], str):
        log.say("prompts are given as they stand; --prompt-template chat would make each a turn of the chat template")
    ids = Renderer(tokenizer).prompts(rows)
    with load.naming(teacher):
        config = AutoConfig.from_pretrained(str(teacher.weights.folder), trust_remote_code=asked.trusted)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    fitting = [(row, one) for row, one in zip(rows, ids, strict=True) if 0 < len(one) <= longest - asked.length]
    if len(fitting) < len(rows):
        log.warn(
            f"{len(rows) - len(fitting):,} of {len(rows):,} prompts are left out: empty, or longer than the "
            f"{longest - asked.length:,} tokens the model reads beside --max-new-tokens {asked.length}"
        )
    if not fitting:
        raise UserError(f"the model has no room for any prompt beside --max-new-tokens {asked.length}; lower it")
    return [row for row, _ in fitting], [one for _, one in fitting], tokenizer_digest(tokenizer)


def _drawn_before(asked: Asked) -> Answered:
    assert asked.drawn_before is not None
    drawn_as, rows, drawn = journal.finished(asked.drawn_before)
    with (asked.drawn_before / journal.DRAWN).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Answered(rows[: asked.limit], drawn[: asked.limit], {**drawn_as, "completions_sha256": digest})


def _judge(asked: Asked, checker: str | None, rows: Sequence[Row]) -> Judge | None:
    """Return what scores the completions, if they are scored; raises `UserError` where it cannot."""
    from align_kit.sampling import judging

    if not asked.judged:
        return None
    judge = judging.judge_of(asked, checker)
    judge.check(rows)
    if missing := choosing.fits(asked, judge.at_least):
        raise UserError(missing)
    return judge


def _kept(asked: Asked, answered: Answered, words: Sequence[str]) -> Path:
    """Judge the completions, write what is kept, and return its card; raises `UserError` where nothing is."""
    scores: Sequence[Sequence[float | None]] = [[None] * len(some) for some in answered.drawn]
    at_least, judged_by = asked.at_least, {}
    judge = _judge(asked, answered.drawn_as["checker"], answered.rows)
    if judge is not None:
        scores = judge(answered.rows, answered.drawn)
        at_least = judge.at_least if at_least is None else at_least
        judged_by = {"judge": judge.name, **({"judge_digest": judge.digest} if judge.digest else {})}
    chooser = choosing.Chooser(asked, at_least, _answer_of(asked))
    for row, some, given in zip(answered.rows, answered.drawn, scores, strict=True):
        chooser.add(row, some, given)
    found, unasked = chooser.found, answered.drawn_as.get("unasked", {})
    log.say(told.table(asked, found, unasked, at_least))
    if not found.rows:
        raise UserError("nothing is left to write; what was drawn is kept: see the table for what to ask for instead")
    facts = told.made_set(asked, words, answered.drawn_as, found, judged_by, unasked, at_least)
    card = _write(asked, answered, scores, facts, found.rows)
    log.say(f"written: {card} ({len(found.rows):,} rows of {len(answered.rows):,} prompts)")
    return card


def _write(
    asked: Asked, answered: Answered, scores: Sequence[Sequence[float | None]], facts: made.MadeSet, rows: list[Row]
) -> Path:
    """Write the rows, and beside them every completion with its score, so that others can be chosen later."""
    finite = [[None if one is None or math.isnan(one) else one for one in some] for some in scores]
    with _aside(asked.output) as aside:
        all_of_them, how = aside / journal.DRAWN, aside / journal.ASKED
        with all_of_them.open("wb") as stream:
            stream.writelines(journal.completed_lines(answered.rows, answered.drawn, finite))
        how.write_text(json.dumps(dict(answered.drawn_as), indent=1) + "\n", encoding="utf-8")
        beside = {journal.DRAWN: all_of_them, journal.ASKED: how}
        return made.write_made(asked.output, facts, {"train": rows}, overwrite=asked.overwrite, beside=beside)


@contextmanager
def _aside(output: Path) -> Iterator[Path]:
    """Give a folder on the disk of the output, where there is room for what is drawn if there is any."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror or error}; name another --output") from None
    with aside as name:
        yield Path(name)


def _answer_of(asked: Asked) -> choosing.AnswerOf:
    from align_kit.data import checkers
    from align_kit.sampling import judging

    if asked.keep != MAJORITY or not asked.answer_of:
        return checkers.number_of
    return judging.answer_of(asked.answer_of)


@contextmanager
def _ending_well(scratch: Path) -> Iterator[None]:
    """Say what is kept where Ctrl-C or SIGTERM stops the command."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        kept = f"; what was drawn is kept in {scratch}, and the same command goes on from there"
        print(f"\nstopped{kept if scratch.is_dir() else ''}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = f"; what was drawn is kept in {scratch}" if scratch.is_dir() else ""
        raise UserError(
            f"the disk of {scratch.parent} is full{kept}: make room, and give the same command again"
        ) from None
    except Exception as error:  # that nobody expected: whoever mends it needs the place
        if scratch.is_dir() and not isinstance(error, UserError):
            error.add_note(f"what was drawn is kept in {scratch}; the same command goes on from there")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
