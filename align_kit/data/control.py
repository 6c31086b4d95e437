"""Control tokens that a row's own text spells: found, and encoded as the text they are.

Chat templates mark turns with tokens such as <|im_end|>, and a tokenizer reads such a mark wherever its text stands.
So that data cannot write marks, a row that spells one is rendered with stand-ins of the same length in its place;
afterwards the template's own marks get other names, known to a copy of the tokenizer that knows no mark by its text.
All else of the tokenizer is as it was, so a row without marks would get the same tokens either way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from align_kit.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"  # what corpora put between documents, whatever the tokenizer's EOS is
PRIVATE = range(0xF0000, 0x10FFFE)  # characters that mean nothing: Unicode's supplementary private use areas
# Some models' marks are added tokens that are not declared special; DeepSeek writes full-width bars.
_LIKE_A_MARK = re.compile(r"<[|\uff5c].*[|\uff5c]>")


class Encoded(NamedTuple):
    """The ids of a text, and for each the characters it stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and added ones written <|like this|>."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        found = {token.content for token in added if token.special or _LIKE_A_MARK.fullmatch(token.content)}
        found |= {str(token) for token in tokenizer.all_special_tokens}
        self.tokens = sorted((token for token in found if token.strip()), key=lambda token: (-len(token), token))
        self.pattern = re.compile("|".join(map(re.escape, self.tokens)) or "(?!)")
        self._disguises: dict[int, Disguise] = {}

    def separates(self, text: str) -> bool:
        """Tell whether a text spells a token that stands between documents."""
        ends = {str(self.tokenizer.eos_token), END_OF_TEXT}
        return any(found[0] in ends for found in self.pattern.finditer(text))

    def within(self, value: Any) -> bool:
        """Tell whether any string in `value` spells a control token."""
        return any(self.pattern.search(text) for text in _strings(value))

    def disguise(self, value: Any) -> Disguise:
        """Return a disguise made of characters that `value` does not hold.

        Raises `UserError` where it holds so many that none is left, or the tokenizer cannot be copied.
        """
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            raise UserError(
                "a row spells a control token, and to encode it as text takes a fast tokenizer; use one, or say "
                "control_tokens: tokens where the data may write control tokens"
            )
        size = 2 * len(self.tokens)
        used = {ord(char) for text in _strings(value) for char in text if ord(char) >= PRIVATE.start}
        free = (at for at in PRIVATE[:-size:size] if used.isdisjoint(range(at, at + size)))
        start = next(free, None)
        if start is None:
            raise UserError("a row holds characters of all private use areas and a control token; remove the row")
        if start not in self._disguises:
            self._disguises[start] = Disguise(self, start)
        return self._disguises[start]


class Disguise:
    """Stand-ins for control tokens in data, and names for those a template writes, of private characters from `start`.

    Each is as long as the token, so that places in a text stay what they are.
    """

    def __init__(self, control: ControlTokens, start: int) -> None:
        count = len(control.tokens)
        self.pattern = control.pattern
        self._token = {chr(start + place): token for place, token in enumerate(control.tokens)}
        self._stand_in = {token: char * len(token) for char, token in self._token.items()}
        self._name = {token: chr(start + count + n) * len(token) for n, token in enumerate(control.tokens)}
        self._runs = re.compile("|".join(f"{char}+" for char in self._token))
        backend = control.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self._tokenizer = _renamed(backend, self._name)
        self._ids = self._moved(backend)

    def _moved(self, backend: Tokenizer) -> dict[int, int]:
        """Return the added tokens that the copy numbers otherwise: its id -> the tokenizer's."""
        places = {token.content: place for place, token in backend.get_added_tokens_decoder().items()}
        ours = {token: self._tokenizer.token_to_id(self._name.get(token, token)) for token in places}
        return {mine: places[token] for token, mine in ours.items() if mine is not None and mine != places[token]}

    def hidden(self, value: Any) -> Any:
        """Return `value` (strings, lists, mappings) with stand-ins for the control tokens its strings spell."""
        return _mapped(value, lambda text: self.pattern.sub(lambda found: self._stand_in[found[0]], text))

    def encode(self, texts: Sequence[str], *, special: bool) -> list[Encoded]:
        """Encode texts made of what was hidden: control tokens that stand there are marks, stand-ins are text."""
        encodings = self._tokenizer.encode_batch([self._shown(text) for text in texts], add_special_tokens=special)
        return [Encoded([self._ids.get(n, n) for n in one.ids], one.offsets) for one in encodings]

    def _shown(self, text: str) -> str:
        named = self.pattern.sub(lambda found: self._name[found[0]], text)
        return self._runs.sub(self._spelt, named)

    def _spelt(self, run: re.Match[str]) -> str:
        """Return the text behind stand-ins of one token; a template may have cut the last of them."""
        token, length = self._token[run[0][0]], len(run[0])
        return (token * -(-length // len(token)))[:length]


def _renamed(backend: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """Return a copy of `backend` that knows the tokens in `names` by their new names only, in its model too."""
    from tokenizers import Tokenizer

    parts = json.loads(backend.to_str())
    for token in parts["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = parts["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(piece, piece): place for piece, place in model["vocab"].items()}
    elif "vocab" in model:  # Unigram
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return Tokenizer.from_str(json.dumps({**parts, "truncation": None, "padding": None}))


def _makes(merge: Any, names: dict[str, str]) -> bool:
    """Tell whether a merge ("a b" or ["a", "b"]) has a renamed token in it, or makes one."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return any(part in names for part in (*parts, "".join(parts)))


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in `value`, the keys of mappings too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _strings(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return `value` with every string in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value
