"""What was counted, judged: does the model learn to stop, is the prompt masked, what was lost, what looks wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from align_kit.config.suspicions import SUSPICIONS
from align_kit.data import health
from align_kit.data.labels import ENOUGH, Labels, Words, share

if TYPE_CHECKING:
    from align_kit.data.report import TokeniseOptions, TokeniseReport
    from align_kit.inspect.decode import Decoder
    from align_kit.inspect.faithful import Faithful
    from align_kit.registry import Recipe

SAID_ALREADY = ("dropped", "cut", "unended", "unrendered")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: its state, its name and a sentence."""

    state: Literal["ok", "note", "NOT"]
    name: str
    what: str


@dataclass(frozen=True)
class Facts:
    """All that is judged."""

    recipe: Recipe
    options: TokeniseOptions
    labels: Labels
    report: TokeniseReport
    words: Words
    decoder: Decoder
    faithful: Faithful
    repeats: int = 0  # rows that are there again because the mixture asks for it

    @property
    def scored(self) -> bool:
        """Whether a model is trained that gives one score to all it reads."""
        return self.recipe.head == "score"


def checks(facts: Facts, warnings: Sequence[str] = ()) -> list[Check]:
    """Return every check of a split of the data; `warnings` are those of the run itself."""
    found = [check for judge in (_end, _prompt, _cut, _boundary, _begin, _pad, _text, _control, _rows)
             for check in judge(facts)]  # fmt: skip
    return [*found, *(Check("note", "data", line) for line in warnings)]


def _end(facts: Facts) -> Iterator[Check]:
    labels = facts.labels
    if labels.kind == "prompt":
        yield Check("ok", "end", "the policy writes the answers; it trains on what it wrote, its end token included")
        return
    names = " or ".join(facts.decoder.name(token) for token in sorted(labels.ended or facts.words.stops))
    if facts.options.packing:
        per_row = labels.documents / max(labels.measured, 1)
        yield Check("ok" if labels.documents else "NOT", "end", f"ends of documents, a trained "
                    f"{facts.decoder.name(facts.words.eos)} each: {labels.documents:,}, {per_row:.2g} in a row; "
                    "what stands before one in a row is seen by what stands behind it")  # fmt: skip
        return
    what = "end in" if facts.scored else "end in a trained"
    said = f"{share(labels.ended.total(), labels.sequences)} {_sequences(labels)} {what} {names}"
    if labels.ended_share >= ENOUGH:
        yield Check("ok", "end", said)
        return
    lest = "for the score is to be of whole answers" if facts.scored else "or the model does not learn to stop"
    yield Check("NOT", "end", f"{said}; at least {ENOUGH:.0%} should, {lest}{_why(facts)}")


def _sequences(labels: Labels) -> str:
    return "completions" if labels.kind in ("preference", "binary", "prompt_completion") else "rows"


def _why(facts: Facts) -> str:
    """Return what the sequences that do not end lack."""
    labels, said = facts.labels, ""
    if labels.turned:
        ((token, count),) = labels.turned.most_common(1)
        name = facts.decoder.name(token)
        said += f"; {share(count, labels.sequences)} end in {name}, which generation does not stop at: make it the EOS"
    if facts.report.cut:
        said += f"; max_length {facts.options.max_length} cuts the end off others"
    return said


def _prompt(facts: Facts) -> Iterator[Check]:
    labels, options = facts.labels, facts.options
    part = f"{labels.trained_share:.1%} of {labels.tokens:,} tokens are trained"
    if labels.kind == "prompt":
        yield Check("ok", "prompt", "prompts are read, not trained on")
    elif facts.scored:
        yield Check("ok", "prompt", "no token is trained: the score of a whole sequence is")
    elif labels.kind in ("preference", "binary"):
        yield Check("ok", "prompt", f"masked in every row; {part}")
    elif labels.kind == "text":
        yield Check("ok", "prompt", f"text has none; {part}")
    elif not labels.open:
        masked = "what the assistant did not say" if options.assistant_only_loss else "every prompt"
        yield Check("ok", "prompt", f"{masked} is masked; {part}")
    elif labels.kind == "messages" and not options.assistant_only_loss:
        yield Check("NOT", "prompt", f"not masked: {share(labels.open, labels.sequences)} rows train every turn, the "
                    "user's too; give --assistant_only_loss true")  # fmt: skip
    elif options.completion_only_loss is False:
        yield Check("note", "prompt", f"not masked (completion_only_loss is false); {part}")
    else:
        yield Check("NOT", "prompt", f"{share(labels.open, labels.sequences)} rows have nothing masked at their start: "
                    f"there the prompt was cut off, or is rendered otherwise once completed; {part}")  # fmt: skip


def _cut(facts: Facts) -> Iterator[Check]:
    report, options = facts.report, facts.options
    dropped = sum(report.dropped.values())
    lost = [f"{share(count, report.rows_in)} rows dropped, {reason}" for reason, count in report.dropped.items()]
    if report.cut_completions:
        lost.append(f"{share(report.cut_completions, report.rows_in)} completions cut, and their end with it")
    if rest := report.cut - report.cut_completions:
        lost.append(f"{share(rest, report.rows_in)} rows cut")
    limit = "no max_length" if options.max_length is None else f"max_length {options.max_length}"
    if facts.recipe.writes and options.max_length is not None:
        limit = f"max_length leaves a prompt {options.max_length - 1} tokens beside {facts.recipe.writes}"
    if not lost:
        left = f"; {report.leftover_tokens:,} tokens at the end fill no row" if report.leftover_tokens else ""
        yield Check("ok", "cut", f"nothing was cut or dropped ({limit}){left}")
        return
    state: Literal["note", "NOT"] = "NOT" if dropped + report.cut > (1 - ENOUGH) * report.rows_in else "note"
    room = facts.faithful.lengths_sentence()
    yield Check(state, "cut", "; ".join([*lost, f"{limit}, {options.truncation_mode}", *([room] if room else [])]))


def _boundary(facts: Facts) -> Iterator[Check]:
    report = facts.report
    if report.kind not in ("prompt_completion", "preference", "binary"):
        return
    if not report.prompt_shortened:
        yield Check("ok", "boundary", "every prompt is the beginning of its completed form, token for token")
        return
    yield Check("note", "boundary", f"{share(report.prompt_shortened, report.rows_in)} prompts end earlier once they "
                "are completed: tokens merge across the boundary, or the template renders the prompt differently "
                "alone; a model that is asked with the prompt sees other tokens than it was trained on")  # fmt: skip


def _begin(facts: Facts) -> Iterator[Check]:
    labels, words = facts.labels, facts.words
    if words.bos is None:
        yield Check("ok", "BOS", "the tokenizer has none")
        return
    name = facts.decoder.name(words.bos)
    if labels.double_bos:
        yield Check("NOT", "BOS", f"{share(labels.double_bos, labels.sequences)} sequences begin with {name} twice; "
                    "take it out of the data or of the chat template")  # fmt: skip
    elif facts.faithful.adds_bos and labels.no_bos and not facts.options.packing:
        yield Check("note", "BOS", f"{share(labels.no_bos, labels.sequences)} sequences begin without {name}, which "
                    "the tokenizer puts before plain text: the chat template leaves it out")  # fmt: skip
    else:
        yield Check("ok", "BOS", f"{name} is nowhere doubled")


def _pad(facts: Facts) -> Iterator[Check]:
    words = facts.words
    if words.pad is None or words.pad != words.eos:
        return
    name = facts.decoder.name(words.pad)
    if facts.scored:
        yield Check("note", "pad", f"the pad token is {name}: the score is read off the last token that is not it, so "
                    "the one before the end")  # fmt: skip
    else:
        yield Check("ok", "pad", f"the pad token is {name}: padding is told by length, so an end token in a row is "
                    "trained all the same")  # fmt: skip


def _text(facts: Facts) -> Iterator[Check]:
    """Judge whether the tokens say what the rows say."""
    unknown, faithful = facts.labels.unknown, facts.faithful
    if unknown:
        yield Check("NOT", "text", f"{unknown:,} tokens stand for text that the tokenizer cannot spell")
    for line in faithful.losses:
        yield Check("NOT", "text", line)
    if not (unknown or faithful.losses):
        yield Check("ok", "text", f"all that {faithful.rows:,} sampled rows say is in their tokens")


def _control(facts: Facts) -> Iterator[Check]:
    report = facts.report
    if report.control_rows:
        yield Check("note", "control", f"{share(report.control_rows, report.rows_in)} rows spell control tokens; they "
                    "are encoded as the text they are")  # fmt: skip


def _rows(facts: Facts) -> Iterator[Check]:
    """Judge what is suspicious about whole rows; what is lost and how rows end has been said."""
    for name, (count, of) in health.shares(facts.report, facts.repeats).items():
        if name in SAID_ALREADY:
            continue
        suspicion = SUSPICIONS[name]
        state: Literal["note", "NOT"] = "NOT" if count > suspicion.said * of else "note"
        yield Check(state, name, f"{share(count, of)} rows {suspicion.what}; {suspicion.remedy}")
