"""Turn canonical rows into token ids and loss masks, token for token as TRL 1.16 does.

Strings: the prompt and prompt + completion + EOS are tokenised separately; the completion starts where the two part.
Conversations: the same, through the chat template. `ids` are lists of int; masks hold 1 where a token is trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from align_kit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Ids = list[int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Split(NamedTuple):
    """A prompt's ids, those of its completions, and whether the prompt alone would have been longer."""

    prompt: Ids
    completions: list[Ids]
    shortened: bool


class Renderer:
    """Renders batches of canonical rows with one tokenizer and one chat template.

    `chat_template` replaces the tokenizer's own (for instance a training template with generation markers).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        if not tokenizer.eos_token:
            raise UserError("the tokenizer has no EOS token, so no completion could end; set eos_token")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._stops = {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()}

    def ends(self, trained: Ids) -> bool:
        """Tell whether trained tokens close with an end token; templates may write a newline or two behind it."""
        return any(token in self._stops for token in trained[-3:])

    def texts(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text with its EOS; a text that ends in EOS gets no second one."""
        return self._encode([self._ended(text) for text in texts])

    def prompts(self, rows: Sequence[Row]) -> list[Ids]:
        """Return the ids of each row's prompt, up to where the model starts to write."""
        rendered = [self._prompt_text(row) for row in rows]
        return self._encode_mixed(rendered)

    def completions(self, rows: Sequence[Row], names: Sequence[str]) -> list[Split]:
        """Return, for each row, the ids of the prompt and of each completion named in `names`.

        The prompt ends at the first token where it parts from any of its completed forms, so that all completions share
        it: that is its own end unless tokens merge across the boundary or the template renders it differently alone.
        """
        prompts = self.prompts(rows)
        whole = [self._encode_mixed([self._whole_text(row, name) for row in rows]) for name in names]
        split = []
        for prompt, *answers in zip(prompts, *whole, strict=True):
            length = min(common_prefix(prompt, answer) for answer in answers)
            rest = [answer[length:] for answer in answers]
            split.append(Split(prompt[:length], rest, shortened=length < len(prompt)))
        return split

    def conversations(self, rows: Sequence[Row]) -> list[Ids]:
        """Return the ids of each row's messages, as the chat template ends them."""
        return self._encode_mixed([(self._template(row["messages"], row), True) for row in rows])

    def assistant_masks(self, rows: Sequence[Row]) -> list[tuple[Ids, list[int]]]:
        """Return (ids, mask) for each row's messages (or prompt + completion), with 1 on the assistant's tokens.

        The template's `{% generation %}` markers decide; a template without them must render each earlier turn alike
        whatever follows, and an assistant turn is then what it adds after the generation prompt, up to its end token.
        Raises UserError where neither holds, or where a row has no assistant token.
        """
        masked = []
        for row in rows:
            messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
            if isinstance(messages, str) or isinstance(row.get("prompt"), str):
                raise UserError("assistant_only_loss needs conversations, but the rows are strings; switch it off")
            marked = self._marked if _GENERATION.search(self._template_source()) else self._prefixed
            ids, mask = marked(messages, row)
            if not any(mask):
                raise UserError("assistant_only_loss: a conversation has no assistant turn to train on; remove the row")
            masked.append((ids, mask))
        return masked

    def _marked(self, messages: list[Row], row: Row) -> tuple[Ids, list[int]]:
        options = self._options(row)
        try:
            out: Any = self.tokenizer.apply_chat_template(
                _clean(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
            )
        except TypeError as error:
            raise UserError(f"the chat template cannot render a conversation ({error}); content must be text") from None
        return list(out["input_ids"]), list(out["assistant_masks"])

    def _prefixed(self, messages: list[Row], row: Row) -> tuple[Ids, list[int]]:
        whole = self._template(messages, row)
        spans = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:place], row, add_generation_prompt=True) if place else ""
            after = self._template(messages[: place + 1], row)
            if not (whole.startswith(before) and whole.startswith(after) and len(after) >= len(before)):
                raise UserError(
                    "assistant_only_loss: the chat template has no {% generation %} markers and renders earlier turns "
                    "differently once others follow; give a training template in chat_template_path"
                )
            # What follows the end token (a newline in ChatML) is not the assistant's to write.
            spans.append((len(before), len(after.rstrip())))
        return self._spans_to_mask(whole, spans)

    def _spans_to_mask(self, text: str, spans: list[tuple[int, int]]) -> tuple[Ids, list[int]]:
        if not self.tokenizer.is_fast:
            raise UserError("assistant_only_loss needs {% generation %} markers with a slow tokenizer; use a fast one")
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [int(any(start <= at < stop for start, stop in spans)) for at, _ in out["offset_mapping"]]
        return list(out["input_ids"]), mask

    def _prompt_text(self, row: Row) -> tuple[str, bool]:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return prompt, False
        return self._template(prompt, row, add_generation_prompt=True), True

    def _whole_text(self, row: Row, name: str) -> tuple[str, bool]:
        prompt, completion = row["prompt"], row[name]
        if isinstance(prompt, str):
            return prompt + self._ended(completion), False
        return self._template([*prompt, *completion], row), True

    def _ended(self, text: str) -> str:
        end = str(self.tokenizer.eos_token)
        return text if text.endswith(end) else text + end

    def _template_source(self) -> str:
        source = self.chat_template or self.tokenizer.chat_template
        if not source:
            raise UserError(
                "the data holds conversations but the tokenizer has no chat template; give one in chat_template_path "
                "(a .jinja file or a model folder), or use prompt and completion strings"
            )
        return source["default"] if isinstance(source, dict) else source

    def _options(self, row: Row) -> dict[str, Any]:
        self._template_source()
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        return {"chat_template": self.chat_template, "tools": tools, **(row.get("chat_template_kwargs") or {})}

    def _template(self, messages: list[Row], row: Row, *, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        options = self._options(row)
        try:
            text = self.tokenizer.apply_chat_template(
                _clean(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except (TemplateError, TypeError) as error:  # TypeError: a template that joins content which is null
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise UserError(f"the chat template refuses a conversation with the roles {roles}: {error}") from None
        return str(text)

    def _encode(self, texts: Sequence[str], *, special: bool = True) -> list[Ids]:
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)["input_ids"]

    def _encode_mixed(self, rendered: Sequence[tuple[str, bool]]) -> list[Ids]:
        """Tokenise (text, from a template); a template writes its own special tokens, a string gets the tokenizer's."""
        encoded: list[Ids] = [[] for _ in rendered]
        for templated in (False, True):
            places = [place for place, (_, kind) in enumerate(rendered) if kind is templated]
            if places:
                ids = self._encode([rendered[place][0] for place in places], special=not templated)
                for place, tokens in zip(places, ids, strict=True):
                    encoded[place] = tokens
        return encoded


def common_prefix(ids: Ids, other: Ids) -> int:
    """Return how many leading tokens two sequences share."""
    if other[: len(ids)] == ids:
        return len(ids)
    return next(place for place, (a, b) in enumerate(zip([*ids, None], [*other, None], strict=False)) if a != b)


def _clean(messages: list[Row]) -> list[Row]:
    """Drop null keys: templates that ask whether a key is defined must not see what a file format filled in."""
    return [{name: value for name, value in message.items() if value is not None or name == "content"}
            for message in messages]  # fmt: skip
