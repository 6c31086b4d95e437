"""What decides how rows become tokens, and the account of what became of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from align_kit.errors import UserError, unknown

TRUNCATION_MODES = ("keep_start", "keep_end", "drop")
CONTROL_TOKENS = ("text", "tokens")


@dataclass(frozen=True)
class TokeniseOptions:
    """What decides a row's tokens beside the tokenizer; names and defaults are TRL's where TRL has them."""

    max_length: int | None = 1024
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = "keep_start"  # drop: longer rows are left out
    completion_only_loss: bool | None = None  # None: the completion of prompt_completion rows, all of others
    assistant_only_loss: bool = False
    chat_template: str | None = None  # replaces the tokenizer's
    control_tokens: Literal["text", "tokens"] = "text"  # what those are that rows spell
    packing: bool = False  # text joined by EOS and cut into full rows of max_length

    def __post_init__(self) -> None:
        if self.truncation_mode not in TRUNCATION_MODES:
            raise unknown("truncation_mode", str(self.truncation_mode), TRUNCATION_MODES)
        if self.control_tokens not in CONTROL_TOKENS:
            raise unknown("control_tokens", str(self.control_tokens), CONTROL_TOKENS)
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length is {self.max_length}; a row needs 2 tokens, one to see and one to predict")
        if self.packing and self.max_length is None:
            raise UserError("packing needs max_length, the length of a full row")


@dataclass
class TokeniseReport:
    """What tokenising did. `dropped`: reason -> rows; `cut`: rows that lost tokens to max_length but stayed;
    `unended`: untruncated rows whose last trained tokens hold no end token; `control_rows`: rows that spell control
    tokens, encoded as text; `separated_rows`: those among them with strings that spell an end of documents inside;
    `leftover_tokens`: the packed tail. `suspected`: suspicion (`config.suspicions`) -> rows, of those `inspected` and
    of the conversations `rendered` to look at; `first`: the number, from 1, of the first such row.
    """

    kind: str
    rows_in: int = 0
    rows_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    cut_completions: int = 0
    empty_completions: int = 0
    identical_pairs: int = 0
    unended: int = 0
    prompt_shortened: int = 0
    control_rows: int = 0
    separated_rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    max_tokens: int = 0
    leftover_tokens: int = 0
    inspected: int = 0
    rendered: int = 0
    suspected: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    digest: str = ""
    place: str = ""  # the folder's name in the cache
    cached: bool = False

    @property
    def mean_tokens(self) -> float:
        """Tokens per sequence kept; a pair has two sequences, each with the prompt."""
        sequences = self.rows_out * (2 if self.kind == "preference" else 1)
        return self.tokens / sequences if sequences else 0.0

    def drop(self, reason: str) -> None:
        """Count one dropped row."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def suspect(self, name: str) -> None:
        """Count one suspicious row, the last one inspected."""
        self.suspected[name] = self.suspected.get(name, 0) + 1
        self.first.setdefault(name, self.inspected)

    def keep(self, tokens: int, trained: int, longest: int) -> None:
        """Count one kept row: the tokens and trained tokens of its sequences together, and its longest sequence."""
        self.rows_out += 1
        self.tokens += tokens
        self.trained_tokens += trained
        self.max_tokens = max(self.max_tokens, longest)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        return {**asdict(self), "mean_tokens": round(self.mean_tokens, 2)}

    def sentence(self) -> str:
        """Return one line for the run's header; losses of rows and completions are always in it."""
        said = [f"{self.rows_in} {self.kind} rows -> {self.rows_out}: {self.tokens} tokens, {self.trained_tokens} "
                f"trained, mean {self.mean_tokens:.0f}, longest {self.max_tokens}"]  # fmt: skip
        for reason, count in self.dropped.items():
            said.append(f"dropped {self._share(count)}, {reason}")
        for count, what in (
            (self.cut_completions, "completions cut at max_length (they lose their end)"),
            (self.cut - self.cut_completions, "rows cut at max_length"),
            (self.empty_completions, "rows have an empty completion"),
            (self.identical_pairs, "pairs have chosen = rejected"),
            (self.unended, "rows train no end token"),
            (self.prompt_shortened, "prompts end earlier once completed (tokens merge, or the template differs)"),
            (self.control_rows, "rows hold control tokens as text"),
            (self.suspected.get("repeated", 0), "rows stand more than once"),
            (self.suspected.get("contradicted", 0), "rows say the opposite of others"),
        ):
            if count:
                said.append(f"{self._share(count)} {what}")
        if self.leftover_tokens:
            said.append(f"{self.leftover_tokens} tokens left over")
        return "; ".join(said)

    def _share(self, count: int) -> str:
        return f"{count} ({count / max(self.rows_in, 1):.1%})"
