"""Turn canonical rows into token ids and loss masks, token for token as TRL 1.16 does.

Strings: the prompt and prompt + completion + EOS are tokenised separately; the completion starts where the two part.
Conversations: the same, through the chat template. `ids` are lists of int; masks hold 1 where a token is trained.
Unlike in TRL, control tokens that a row's own text spells are text (see `control`), unless the renderer is told so, and
a message's chain of thought is not lost: a template that does not show it gets it as part of the content (`chains`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from align_kit.data.chains import Chains
from align_kit.data.control import ControlTokens, Disguise
from align_kit.data.report import TokeniseReport
from align_kit.data.turns import short
from align_kit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Ids = list[int]
RENDERED = ("text", "messages", "prompt", "completion", "chosen", "rejected", "tools", "chat_template_kwargs",
            "reason_template")  # fmt: skip
ENDED = ("text", "completion", "chosen", "rejected")  # strings that get an EOS where they have none
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Split(NamedTuple):
    """A prompt's ids, those of its completions, and whether the prompt alone would have been longer."""

    prompt: Ids
    completions: list[Ids]
    shortened: bool


class Own(NamedTuple):
    """What of a row is rendered; where it spells control tokens, with stand-ins and the disguise they belong to."""

    row: Row
    disguise: Disguise | None


class Rendered(NamedTuple):
    """A text to tokenise; a template writes its own special tokens, a string gets the tokenizer's."""

    text: str
    templated: bool
    disguise: Disguise | None


class Renderer:
    """Renders batches of canonical rows with one tokenizer and one chat template.

    `chat_template` replaces the tokenizer's own (for instance a training template with generation markers).
    `control_tokens` says what those are that rows spell: "text", or "tokens" as for rows that were rendered before.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, control_tokens: str = "text"
    ) -> None:
        if not tokenizer.eos_token:
            raise UserError("the tokenizer has no EOS token, so no completion could end; set eos_token")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.control = ControlTokens(tokenizer) if control_tokens == "text" else None
        self._chains = Chains(self._tried)
        self._stops = {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()}

    def ends(self, trained: Ids) -> bool:
        """Tell whether trained tokens close with an end token; templates may write a newline or two behind it."""
        return any(token in self._stops for token in trained[-3:])

    def texts(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text with its EOS; a text that ends in EOS gets no second one."""
        owns = [self._own({"text": text}) for text in texts]
        return self._encode([Rendered(self._ended(own.row["text"]), False, own.disguise) for own in owns])

    def prompts(self, rows: Sequence[Row]) -> list[Ids]:
        """Return the ids of each row's prompt, up to where the model starts to write."""
        return self._encode([self._prompt_text(self._own(row)) for row in rows])

    def completions(self, rows: Sequence[Row], names: Sequence[str]) -> list[Split]:
        """Return, for each row, the ids of the prompt and of each completion named in `names`.

        The prompt ends at the first token where it parts from any of its completed forms, so that all completions share
        it: that is its own end unless tokens merge across the boundary or the template renders it differently alone.
        """
        owns = [self._own(row) for row in rows]
        prompts = self._encode([self._prompt_text(own) for own in owns])
        whole = [self._encode([self._whole_text(own, name) for own in owns]) for name in names]
        split = []
        for prompt, *answers in zip(prompts, *whole, strict=True):
            length = min(common_prefix(prompt, answer) for answer in answers)
            rest = [answer[length:] for answer in answers]
            split.append(Split(prompt[:length], rest, shortened=length < len(prompt)))
        return split

    def rendered(self, messages: list[Row], row: Row) -> str:
        """Return what the chat template makes of `messages`, with the tools and variables of `row`."""
        return self._template(messages, row)

    def conversations(self, rows: Sequence[Row]) -> list[Ids]:
        """Return the ids of each row's messages, as the chat template ends them."""
        owns = [self._own(row) for row in rows]
        return self._encode([Rendered(self._template(row["messages"], row), True, it) for row, it in owns])

    def count_control(self, rows: Sequence[Row], report: TokeniseReport) -> None:
        """Count in `report` the rows with control tokens that are encoded as text."""
        if self.control is None:
            return
        for own in map(self._bare, rows):
            strings = [own[name] for name in ("prompt", *ENDED) if isinstance(own.get(name), str)]
            report.control_rows += self.control.within(own)
            report.separated_rows += any(map(self.control.separates, strings))

    def assistant_masks(self, rows: Sequence[Row]) -> list[tuple[Ids, list[int]]]:
        """Return (ids, mask) for each row's messages (or prompt + completion), with 1 on the assistant's tokens.

        The template's `{% generation %}` markers decide; a template without them must render each earlier turn alike
        whatever follows, and an assistant turn is then what it adds after the generation prompt, up to its end token.
        Raises UserError where neither holds, or where a row has no assistant token.
        """
        masked = []
        for own in map(self._own, rows):
            row = own.row
            messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
            if isinstance(messages, str) or isinstance(row.get("prompt"), str):
                raise UserError("assistant_only_loss needs conversations, but the rows are strings; switch it off")
            marked = self._marked if _GENERATION.search(self._template_source()) else self._prefixed
            ids, mask = marked(messages, own)
            if not any(mask):
                raise UserError("assistant_only_loss: a conversation has no assistant turn to train on; remove the row")
            masked.append((ids, mask))
        return masked

    def _own(self, row: Row) -> Own:
        """Return what of a row is rendered, disguised where it spells control tokens; an EOS at its end is no text."""
        if self.control is None:
            return Own(row, None)
        own = self._bare(row)
        if not self.control.within(own):
            return Own(own, None)
        disguise = self.control.disguise(own)
        return Own(disguise.hidden(own), disguise)

    def _bare(self, row: Row) -> Row:
        """Return what of a row is rendered, without the EOS at the end of its strings."""
        own = {name: row[name] for name in RENDERED if row.get(name) is not None}
        if isinstance(own.get("tools"), str):
            own["tools"] = json.loads(own["tools"])
        end = str(self.tokenizer.eos_token)
        return own | {name: own[name].removesuffix(end) for name in ENDED if isinstance(own.get(name), str)}

    def _marked(self, messages: list[Row], own: Own) -> tuple[Ids, list[int]]:
        options = self._options(own.row)
        try:
            if own.disguise is not None:
                told = self._told(messages, own.row, options)
                return self._spans_to_mask(*self._marked_spans(told, **options), own.disguise)
            out: Any = self.tokenizer.apply_chat_template(
                self._told(messages, own.row, options),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **options,
            )
        except _refusals() as error:
            raise _refused(messages, error) from None
        return list(out["input_ids"]), list(out["assistant_masks"])

    def _marked_spans(
        self, messages: list[Row], *, chat_template: str | None, tools: Any, **variables: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered text and where the template says that the assistant writes, as transformers does."""
        from transformers.utils.chat_template_utils import render_jinja_template

        told = [{name: value for name, value in message.items() if value is not None} for message in messages]
        rendered: Any = render_jinja_template(
            conversations=[told],
            tools=tools,
            chat_template=self.tokenizer.get_chat_template(chat_template, tools),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **variables},
        )
        texts, spans = rendered
        return texts[0], spans[0]

    def _prefixed(self, messages: list[Row], own: Own) -> tuple[Ids, list[int]]:
        row = own.row
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
        return self._spans_to_mask(whole, spans, own.disguise)

    def _spans_to_mask(
        self, text: str, spans: list[tuple[int, int]], disguise: Disguise | None
    ) -> tuple[Ids, list[int]]:
        if not self.tokenizer.is_fast:
            raise UserError("assistant_only_loss needs {% generation %} markers with a slow tokenizer; use a fast one")
        if disguise is not None:
            ((ids, offsets),) = disguise.encode([text], special=False)
        else:
            out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets = list(out["input_ids"]), out["offset_mapping"]
        return ids, [int(any(start <= at < stop for start, stop in spans)) for at, _ in offsets]

    def _prompt_text(self, own: Own) -> Rendered:
        prompt = own.row["prompt"]
        if isinstance(prompt, str):
            return Rendered(prompt, False, own.disguise)
        return Rendered(self._template(prompt, own.row, add_generation_prompt=True), True, own.disguise)

    def _whole_text(self, own: Own, name: str) -> Rendered:
        prompt, completion = own.row["prompt"], own.row[name]
        if isinstance(prompt, str):
            return Rendered(prompt + self._ended(completion), False, own.disguise)
        return Rendered(self._template([*prompt, *completion], own.row), True, own.disguise)

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
        options = self._options(row)
        try:
            told = self._told(messages, row, options)
            return self._applied(told, add_generation_prompt=add_generation_prompt, **options)
        except _refusals() as error:
            raise _refused(messages, error) from None

    def _applied(self, messages: list[Row], **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def _tried(self, messages: list[Row], options: dict[str, Any]) -> str:
        """Return what the template makes of a conversation that is not in the data, "" where it refuses that."""
        try:
            return self._applied(messages, **options)
        except _refusals():
            return ""

    def _told(self, messages: list[Row], row: Row, options: dict[str, Any]) -> list[Row]:
        """Return the messages as the template takes them: without null keys, chains of thought where it shows them."""
        return self._chains.told(_clean(messages), row.get("reason_template"), options)

    def _encode(self, rendered: Sequence[Rendered]) -> list[Ids]:
        """Tokenise texts, those of one kind together."""
        kinds: dict[tuple[bool, Disguise | None], list[int]] = {}
        for place, one in enumerate(rendered):
            kinds.setdefault((one.templated, one.disguise), []).append(place)
        encoded: list[Ids] = [[] for _ in rendered]
        for (templated, disguise), places in kinds.items():
            texts = [rendered[place].text for place in places]
            if disguise is not None:
                many = [ids for ids, _ in disguise.encode(texts, special=not templated)]
            else:
                many = self.tokenizer(texts, add_special_tokens=not templated, return_attention_mask=False)["input_ids"]
            for place, ids in zip(places, many, strict=True):
                encoded[place] = ids
        return encoded


def _refusals() -> tuple[type[Exception], ...]:
    """Return what rendering may raise: the sandbox's and the template's own refusals, and mistakes in its arithmetic.

    TypeError comes from a template that joins content which is null.
    """
    from jinja2 import TemplateError

    return TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError


def _refused(messages: list[Row], error: Exception) -> UserError:
    roles = ", ".join(str(message.get("role")) for message in messages)
    begins = f"; it begins {short(messages[0].get('content'))}" if messages else ""
    return UserError(f"the chat template refuses a conversation with the roles {roles}: {error}{begins}")


def common_prefix(ids: Ids, other: Ids) -> int:
    """Return how many leading tokens two sequences share."""
    if other[: len(ids)] == ids:
        return len(ids)
    return next(place for place, (a, b) in enumerate(zip([*ids, None], [*other, None], strict=False)) if a != b)


def _clean(messages: list[Row]) -> list[Row]:
    """Drop null keys: templates that ask whether a key is defined must not see what a file format filled in."""
    return [{name: value for name, value in message.items() if value is not None or name == "content"}
            for message in messages]  # fmt: skip
