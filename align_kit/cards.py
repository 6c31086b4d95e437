"""Data cards: what a data set is, where it comes from, what its licence says, and which digest proves it.

A card is `data_cards/<name>.md`: Hugging Face front matter, one validated `align_kit:` block in it, and a datasheet in
Markdown (Gebru et al. 2021) below. Cards are data; nothing here opens the rows they describe.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from align_kit.errors import UserError, unknown
from align_kit.resources import folder

SCHEMA_VERSION = 1
HEADINGS = ("Motivation", "Composition", "Collection", "Preprocessing", "Uses", "Distribution", "Maintenance")

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
}
Phase = Literal["pretrain", "sft", "reward", "dpo", "orpo", "kto", "ppo", "eval"]
Format = Literal["text", "prompt", "prompt_completion", "messages", "preference", "binary", "alpaca", "sharegpt"]

_UNKNOWN_LICENCES = {"unknown", "other"}
_SLICE = re.compile(r"^(?P<name>[^\[\]]+?)(\[(?P<start>[^:\[\]]*):(?P<stop>[^:\[\]]*)\])?$")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """Where the rows are: built into the package, files on disk, or a data set on the hub."""

    kind: Literal["builtin", "file", "hub"]
    path: str  # a built-in name, a folder below the data home, or a hub id
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


class Block(_Strict):
    """The `align_kit:` block of a card."""

    schema_version: Literal[1]
    phases: list[Phase] = Field(min_length=1)
    source: Source
    format: Format
    columns: dict[str, str] = Field(default_factory=dict)  # canonical name -> column (dots reach into it)
    splits: dict[str, str] = Field(min_length=1)  # our split -> hub split, or file, with an optional [a:b] slice
    prompt_template: str | None = None  # "chat", or a text that holds {prompt}
    weight: float | None = Field(default=None, gt=0)
    max_samples: int | None = Field(default=None, gt=0)
    checker: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    verified: bool

    @field_validator("prompt_template")
    @classmethod
    def _known_template(cls, value: str | None) -> str | None:
        if value is not None and not is_template(value):
            raise ValueError("must be 'chat' or a text that holds {prompt}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Block:
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
        return self

    def files(self) -> dict[str, str]:
        """Return our split -> file (without a slice) for what can be read from disk."""
        if self.source.kind == "file":
            return {split: parse_slice(file)[0] for split, file in self.splits.items()}
        return {split: parse_slice(file)[0] for split, file in self.source.local.items()}


@dataclass(frozen=True)
class Card:
    """A validated card: `name` and `file`, the front matter's licence and title, the block and the Markdown body."""

    name: str
    file: Path
    licences: tuple[str, ...]
    pretty_name: str
    block: Block
    body: str

    def warnings(self) -> list[str]:
        """Return what a user should know before training: licence limits, and a card nobody could check."""
        found = [f"card {self.name}: {text}" for text in licence_warnings(self.licences)]
        if not self.block.verified:
            found.append(f"card {self.name}: not verified against its source")
        return found


def is_template(text: str) -> bool:
    """Tell whether `text` is a prompt template: `chat`, or a text that holds {prompt} (alone it changes nothing)."""
    return text == "chat" or "{prompt}" in text


def checker(card: Card) -> Callable[[str, str, str], Any]:
    """Return the function the card names to judge a completion: (prompt, completion, answer) -> verdict.

    Raises UserError when the card names none, or one that cannot be imported.
    """
    dotted = card.block.checker
    if dotted is None:
        raise UserError(f"card {card.name} names no checker; add one to its align_kit block, as card gsm8k does")
    module, _, name = dotted.partition(":")
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise UserError(f"card {card.name}: checker {dotted} cannot be imported ({error})") from None


def licence_warnings(licences: tuple[str, ...]) -> list[str]:
    """Return one warning for each licence that is unknown or forbids commercial use."""
    found = []
    for licence in licences:
        word = licence.lower()
        if word in _UNKNOWN_LICENCES:
            found.append(f"licence {licence!r} is unknown; check that you may train on it")
        elif re.search(r"(^|-)nc(-|$)", word) or "non-commercial" in word or "noncommercial" in word:
            found.append(f"licence {licence!r} forbids commercial use")
    return found


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


def card_folders() -> list[Path]:
    """Return the folders that are searched for cards: `./data_cards` first, then the packaged ones."""
    folders = [Path("data_cards"), folder("data_cards")]
    return [path for path in folders if path.is_dir()]


def card_names() -> list[str]:
    """Return the names of all cards that can be found."""
    return sorted({file.stem for path in card_folders() for file in path.glob("*.md") if file.stem != "README"})


def load_card(name: str | Path) -> Card:
    """Return the card called `name`, or the one in the file `name` when it ends in .md.

    Raises UserError for an unknown name (with the nearest ones), unreadable YAML, a missing licence or a field that
    is wrong (naming file and field).
    """
    if str(name).endswith(".md"):
        return read_card(Path(name))
    for path in card_folders():
        if (path / f"{name}.md").is_file():
            return read_card(path / f"{name}.md")
    raise unknown("card", str(name), card_names())


def read_card(file: Path) -> Card:
    """Read and validate one card file; raises UserError as `load_card` does."""
    front, body = _front_matter(file)
    given = front.get("license")
    if given == "other" and isinstance(front.get("license_name"), str):  # Hugging Face's way to name one off its list
        given = front["license_name"]
    licences = tuple([given] if isinstance(given, str) else given or ())
    if not licences or not all(isinstance(word, str) and word.strip() for word in licences):
        raise UserError(f"{file}: field license: missing; name the data's licence, e.g. 'license: mit' or 'unknown'")
    if not isinstance(front.get("pretty_name"), str):
        raise UserError(f"{file}: field pretty_name: missing; give the data set's name in words")
    if not isinstance(front.get("align_kit"), dict):
        raise UserError(f"{file}: field align_kit: missing; a card needs one align_kit block in its front matter")
    try:
        block = Block.model_validate(front["align_kit"])
    except ValidationError as error:
        raise UserError(f"{file}: {_first_problem(error)}") from None
    return Card(file.stem, file, licences, front["pretty_name"], block, body)


def _front_matter(file: Path) -> tuple[dict[str, Any], str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the card {file}: {error}") from None
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n?(.*)", text, re.DOTALL)
    if not match:
        raise UserError(f"{file}: no front matter; a card starts with YAML between two lines of ---")
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 2}" if mark else ""  # one for the opening ---, one because marks count from 0
        raise UserError(f"{file}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(front, dict):
        raise UserError(f"{file}: the front matter is not a mapping of fields")
    return front, match[2]


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    field = ".".join(["align_kit", *map(str, problem["loc"])])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        holder = Source if "source" in problem["loc"] else Block
        message = str(unknown("field", str(problem["loc"][-1]), holder.model_fields))
    elif problem["type"] != "missing" and not isinstance(problem["input"], dict):
        message = f"{message} (got {problem['input']!r})"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"field {field}: {message}{more}"


def data_home(override: str | Path | None = None) -> Path | None:
    """Return the folder that holds one folder per data set: `override`, else `$ALIGN_KIT_DATA`, else None."""
    chosen = override or os.environ.get("ALIGN_KIT_DATA")
    if chosen and not Path(chosen).is_dir():
        raise UserError(f"ALIGN_KIT_DATA is {str(chosen)!r}, which is not a folder")
    return Path(chosen) if chosen else None


def local_file(card: Card, split: str, home: Path | None) -> Path | None:
    """Return the verified file that serves `split` from disk, or None where there is none.

    A file card's folder is looked for below `home`, then beside the card, then from the working folder.
    Raises UserError when the file's SHA-256 is not the card's.
    """
    name = card.block.files().get(split)
    if name is None:
        return None
    if card.block.source.kind == "file":
        below = Path(card.block.source.path)
        candidates = [*([home / below / name] if home else []), card.file.parent / below / name, below / name]
    else:
        candidates = [home / name] if home else []
    for path in candidates:
        if path.is_file():
            verify_sha256(card, name, path)
            return path
    return None


def verify_sha256(card: Card, name: str, path: Path) -> None:
    """Raise UserError when `path` does not have the digest that the card gives for `name`."""
    expected = card.block.source.sha256.get(name)
    if expected is None:
        return
    with path.open("rb") as stream:
        seen = hashlib.file_digest(stream, "sha256").hexdigest()
    if seen != expected:
        raise UserError(
            f"{path}: sha256 is {seen[:16]}..., the card {card.file} says {expected[:16]}...; "
            "restore the file, or update source.sha256 if the change was meant"
        )


def alternatives(phase: str | None) -> list[str]:
    """Return the built-in cards (no download) that serve `phase`, or all of them where phase is None."""
    found = []
    for name in card_names():
        try:
            block = load_card(name).block
        except UserError:
            continue  # a broken card of the user's own must not hide the advice
        if block.source.kind == "builtin" and (phase is None or phase in block.phases):
            found.append(name)
    return found
