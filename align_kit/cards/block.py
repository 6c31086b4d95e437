"""The `align_kit:` block of a card, field by field: what it may hold, and what is said where it does not fit."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from align_kit.errors import UserError, unknown

SCHEMA_VERSION = 1
PER_SPLIT = ("rows", "characters")  # the stats that align_kit counts itself, of canonical rows, for each split

# The kinds of canonical rows a phase can train on, the one it was made for first.
PHASE_KINDS: dict[str, tuple[str, ...]] = {
    "pretrain": ("text",),
    "sft": ("prompt_completion", "messages", "text"),
    "reward": ("preference",),
    "dpo": ("preference",),
    "orpo": ("preference",),
    "kto": ("binary", "preference"),  # a pair is one good and one bad completion
    "ppo": ("prompt", "prompt_completion"),  # only the prompt is used; the completion becomes the answer to check
    "eval": ("prompt", "prompt_completion", "messages", "preference", "binary", "text"),
}
# The kinds that a file of each format can turn into.
FORMAT_KINDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt": ("prompt",),
    "prompt_completion": ("prompt_completion",),
    "messages": ("messages",),
    "preference": ("preference",),
    "binary": ("binary",),
    "alpaca": ("prompt_completion", "preference"),
    "sharegpt": ("messages", "preference"),
    "reason": ("prompt_completion", "preference"),
}
Phase = Literal["pretrain", "sft", "reward", "dpo", "orpo", "kto", "ppo", "eval"]
Format = Literal[
    "text", "prompt", "prompt_completion", "messages", "preference", "binary", "alpaca", "sharegpt", "reason"
]

_SLICE = re.compile(r"^(?P<name>[^\[\]]+?)(\[(?P<start>[^:\[\]]*):(?P<stop>[^:\[\]]*)\])?$")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """Where the rows are: built into the package, files on disk, or a data set on the hub."""

    kind: Literal["builtin", "file", "hub"]
    path: str  # a built-in name, a folder below the data home (.: the card's own), or a hub id
    name: str | None = None  # the hub set's configuration
    data_dir: str | None = None
    revision: str | None = None
    homepage: str | None = None
    local: dict[str, str] = Field(default_factory=dict)  # our split -> file below the data home (hub sources)
    sha256: dict[str, str] = Field(default_factory=dict)  # file, as written in `local` or `splits` -> digest

    @field_validator("sha256")
    @classmethod
    def _whole_digests(cls, value: dict[str, str]) -> dict[str, str]:
        for name, digest in value.items():
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise ValueError(f"the digest of {name} is not 64 lower-case hexadecimal digits")
        return value


class Filter(_Strict):
    """What one rule dropped when the rows were made, and how many lines it cut out of rows that stay."""

    name: str
    rule: str | None = None
    threshold: int | float | str | None = None
    dropped: int = Field(ge=0)
    cut: int | None = Field(default=None, ge=0)


class Decontamination(_Strict):
    """Rows dropped because they share a run of `n` words with an evaluation set."""

    against: str
    n: int = Field(gt=0)
    dropped: int = Field(ge=0)


class _Record(BaseModel):
    """Named fields, and free facts beside them that are one value each."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="after")
    def _scalar_facts(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if not isinstance(value, (str, int, float, bool, type(None))):
                raise ValueError(f"{name} must be one number, text or true/false, not a {type(value).__name__}")
        return self


class Origin(_Record):
    """One source that rows were made from: a card or a file, which rows of it, and their digest."""

    card: str | None = None
    file: str | None = None
    split: str | None = None
    digest: str | None = Field(default=None, pattern=r"^[0-9a-f]{32,64}$")
    rows: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.card is None) == (self.file is None):
            raise ValueError("name either a card or a file")
        return self


class Made(_Record):
    """How a set was made: the words of the command, its seed, the version of align_kit, and the sources."""

    command: list[str] = Field(min_length=1)
    seed: int | None = None
    align_kit: str
    sources: list[Origin] = Field(default_factory=list, alias="from")


class Block(_Strict):
    """The `align_kit:` block of a card."""

    schema_version: Literal[1]
    phases: list[Phase] = Field(min_length=1)
    source: Source
    format: Format
    columns: dict[str, str] = Field(default_factory=dict)  # canonical name -> column (dots reach into it)
    splits: dict[str, str] = Field(min_length=1)  # our split -> hub split, or file, with an optional [a:b] slice
    prompt_template: str | None = None  # "chat", or a text that holds {prompt}
    reason_template: str | None = None  # format reason: how chain of thought and answer stand in one text
    weight: float | None = Field(default=None, gt=0)
    max_samples: int | None = Field(default=None, gt=0)
    checker: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    verified: bool
    stats: dict[str, Any] = Field(default_factory=dict)  # name -> a number, or split -> number, as in rows: {train: 9}
    filters: list[Filter] = Field(default_factory=list)
    decontamination: list[Decontamination] = Field(default_factory=list)
    pii: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)  # kind -> places replaced
    made: Made | None = None

    @field_validator("stats")
    @classmethod
    def _numbers(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, stat in value.items():
            numbers = stat.values() if isinstance(stat, dict) else [stat]
            if not all(isinstance(one, (int, float)) and math.isfinite(one) for one in numbers):
                raise ValueError(f"{name} must be a number, or a mapping of splits to numbers")
        return value

    @field_validator("prompt_template")
    @classmethod
    def _known_template(cls, value: str | None) -> str | None:
        if value is not None and not is_template(value):
            raise ValueError("must be 'chat' or a text that holds {prompt}")
        return value

    @field_validator("reason_template")
    @classmethod
    def _parting_template(cls, value: str | None) -> str | None:
        if value is not None and (fault := reason_fault(value)):
            raise ValueError(fault)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Block:
        if self.reason_template is not None and self.format != "reason":
            raise ValueError(f"reason_template belongs to format 'reason', not to {self.format!r}")
        for phase in self.phases:
            if not set(PHASE_KINDS[phase]) & set(FORMAT_KINDS[self.format]):
                raise ValueError(f"phase {phase!r} cannot use format {self.format!r}")
        known = set(self.files().values())
        for name in self.source.sha256:
            if name not in known:
                raise ValueError(f"source.sha256 names {name!r}, which no split reads")
        if self.source.kind == "file":
            for name in sorted(known - set(self.source.sha256)):
                raise ValueError(f"source.sha256 lacks the digest of {name!r}")
        for stat in PER_SPLIT:
            counts = self.stats.get(stat, {})
            if not isinstance(counts, dict) or not set(counts) <= set(self.splits):
                raise ValueError(f"stats.{stat} must be a mapping of the card's splits to numbers")
        return self

    def files(self) -> dict[str, str]:
        """Return our split -> file (without a slice) for what can be read from disk."""
        if self.source.kind == "file":
            return {split: parse_slice(file)[0] for split, file in self.splits.items()}
        return {split: parse_slice(file)[0] for split, file in self.source.local.items()}


def is_template(text: str) -> bool:
    """Tell whether `text` is a prompt template: `chat`, or a text that holds {prompt} (alone it changes nothing)."""
    return text == "chat" or "{prompt}" in text


def reason_fault(text: str) -> str | None:
    """Return why `text` cannot say how a chain of thought and its answer stand in one text; None where it can."""
    for part in ("{reasoning}", "{answer}"):
        if text.count(part) != 1:
            return f"must hold {part} once, not {text.count(part)} times"
    before, _, after = text.partition("{reasoning}")
    if "{answer}" in before:
        return "must have {reasoning} before {answer}: a model that answers first has not reasoned"
    if after.startswith("{answer}"):
        return "must have a mark between {reasoning} and {answer}, by which they can be told apart"
    return None


def parse_slice(split: str) -> tuple[str, str | None, str | None]:
    """Split `train[10%:90%]` into its name, start and stop (None where left out); raises UserError."""
    match = _SLICE.match(split.strip())
    if not match:
        raise UserError(f"cannot read the split {split!r}; write train, train[:1000], train[10%:90%]")
    start, stop = (match["start"] or "").strip() or None, (match["stop"] or "").strip() or None
    for bound in (start, stop):
        if bound and not re.fullmatch(r"-?\d+%?", bound):
            raise UserError(f"cannot read {bound!r} in the split {split!r}; a bound is rows (1000) or per cent (90%)")
    return match["name"].strip(), start, stop


def slice_bounds(split: str, rows: int) -> tuple[int, int]:
    """Return the half-open range of row numbers that `split` keeps of `rows` rows, as Hugging Face counts them."""
    _, start, stop = parse_slice(split)

    def position(bound: str | None, default: int) -> int:
        if bound is None:
            return default
        value = round(rows * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)
        return min(max(value + rows if value < 0 else value, 0), rows)

    return position(start, 0), position(stop, rows)


def first_problem(error: ValidationError) -> str:
    """Return the first of the mistakes in an `align_kit:` block, with the field that it is in."""
    problems = error.errors()
    # A name that does not exist is usually why another one is missing.
    problem = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    field = ".".join(["align_kit", *map(str, problem["loc"])])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        holder = _HOLDERS.get(str(problem["loc"][0]), Block)
        message = str(unknown("field", str(problem["loc"][-1]), holder.model_fields))
    elif problem["type"] != "missing" and not isinstance(problem["input"], dict):
        message = f"{message} (got {problem['input']!r})"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"field {field}: {message}{more}"


_HOLDERS: dict[str, type[_Strict]] = {"source": Source, "filters": Filter, "decontamination": Decontamination}
