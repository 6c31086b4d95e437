"""Make tokenised rows of canonical ones: mask, truncate, drop what nothing could be learnt from, and count it all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from align_kit.data.render import Ids, Renderer, Row, Split
from align_kit.data.report import TokeniseOptions, TokeniseReport

LANGUAGE_KINDS = ("text", "prompt_completion", "messages")
PROMPT_FILLS = "prompt fills max_length"
NO_PROMPT_LEFT = "completion fills max_length"
TOO_LONG = "longer than max_length"
EMPTY_TEXT = "empty text"
NOTHING_TRAINED = "no token to predict"

# Yields one tokenised row for each given, in order: None for one that is dropped, which is counted.
Maker = Callable[[Sequence[Row], Renderer, TokeniseOptions, TokeniseReport], Iterator[Row | None]]


def _text_rows(
    rows: Sequence[Row], renderer: Renderer, options: TokeniseOptions, report: TokeniseReport
) -> Iterator[Row | None]:
    texts = iter(renderer.texts([row["text"] for row in rows if row["text"].strip()]))
    for row in rows:
        if not row["text"].strip():
            report.drop(EMPTY_TEXT)
            yield None
            continue
        ids = next(texts)
        if options.packing:
            yield {"input_ids": ids}
        else:
            yield from _language(ids, [1] * len(ids), renderer, options, report)


def _completion_rows(
    rows: Sequence[Row], renderer: Renderer, options: TokeniseOptions, report: TokeniseReport
) -> Iterator[Row | None]:
    assistants = renderer.assistant_masks(rows) if options.assistant_only_loss else None
    for place, split in enumerate(renderer.completions(rows, ["completion"])):
        prompt, (completion,) = split.prompt, split.completions
        whole = options.completion_only_loss is False
        mask = [int(whole)] * len(prompt) + [1] * len(completion)
        if assistants is not None:
            mask = [a & b for a, b in zip(mask, assistants[place][1], strict=True)]
        report.empty_completions += not rows[place]["completion"]
        report.prompt_shortened += split.shortened
        yield from _language(prompt + completion, mask, renderer, options, report)


def _message_rows(
    rows: Sequence[Row], renderer: Renderer, options: TokeniseOptions, report: TokeniseReport
) -> Iterator[Row | None]:
    if options.assistant_only_loss:
        for ids, mask in renderer.assistant_masks(rows):
            yield from _language(ids, mask, renderer, options, report)
    else:
        for ids in renderer.conversations(rows):
            yield from _language(ids, [1] * len(ids), renderer, options, report)


def _language(
    ids: Ids, mask: list[int], renderer: Renderer, options: TokeniseOptions, report: TokeniseReport
) -> Iterator[Row | None]:
    """Truncate one language row as TRL does, count it, and yield it, or None where nothing trained is left."""
    limit = options.max_length
    trained = sum(mask)
    report.unended += not renderer.ends([token for token, kept in zip(ids, mask, strict=True) if kept])
    if limit is not None and len(ids) > limit:
        if options.truncation_mode == "drop":
            report.drop(TOO_LONG)
            yield None
            return
        kept = slice(None, limit) if options.truncation_mode == "keep_start" else slice(-limit, None)
        ids, mask = ids[kept], mask[kept]
        if not any(mask):
            report.drop(PROMPT_FILLS)
            yield None
            return
        report.cut += 1
        report.cut_completions += sum(mask) < trained
    # The first token has nothing before it to be predicted from.
    if not any(mask[1:]):
        report.drop(NOTHING_TRAINED)
        yield None
        return
    report.keep(len(ids), sum(mask), len(ids))
    yield {"input_ids": ids, "loss_mask": mask}


def _preference_rows(
    rows: Sequence[Row], renderer: Renderer, options: TokeniseOptions, report: TokeniseReport
) -> Iterator[Row | None]:
    for row, split in zip(rows, renderer.completions(rows, ["chosen", "rejected"]), strict=True):
        fitted = _fit(split, renderer, options, report)
        if fitted is None:
            yield None
            continue
        prompt, (chosen, rejected) = fitted
        report.empty_completions += not (row["chosen"] and row["rejected"])
        report.identical_pairs += chosen == rejected
        yield {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def _binary_rows(
    rows: Sequence[Row], renderer: Renderer, options: TokeniseOptions, report: TokeniseReport
) -> Iterator[Row | None]:
    for row, split in zip(rows, renderer.completions(rows, ["completion"]), strict=True):
        fitted = _fit(split, renderer, options, report)
        if fitted is None:
            yield None
            continue
        prompt, (completion,) = fitted
        report.empty_completions += not row["completion"]
        yield {"prompt_ids": prompt, "completion_ids": completion, "label": row["label"]}


def _prompt_rows(
    rows: Sequence[Row], renderer: Renderer, options: TokeniseOptions, report: TokeniseReport
) -> Iterator[Row | None]:
    """Yield prompts to write from, with what a reward may ask for: the prompt as given and its answer, or None.

    A prompt is never cut; one that fills max_length is dropped.
    """
    for row, prompt in zip(rows, renderer.prompts(rows), strict=True):
        if options.max_length is not None and len(prompt) >= options.max_length:
            report.drop(PROMPT_FILLS)
            yield None
            continue
        report.keep(len(prompt), 0, len(prompt))
        yield {"prompt_ids": prompt, "prompt": row["prompt"], "answer": row.get("answer")}


def _fit(
    split: Split, renderer: Renderer, options: TokeniseOptions, report: TokeniseReport
) -> tuple[Ids, list[Ids]] | None:
    """Cut a prompt and its completions to max_length, count the row, and return None where it is dropped.

    `keep_start` cuts each completion's end, as TRL does. `keep_end` cuts the prompt's start, by what the longest
    completion needs: the completions keep one prompt, where TRL gives each its own.
    """
    prompt, completions = split.prompt, split.completions
    longest = max(len(ids) for ids in completions)
    limit = options.max_length
    report.prompt_shortened += split.shortened
    report.unended += not all(renderer.ends(ids) for ids in completions)
    if limit is not None and len(prompt) + longest > limit:
        if options.truncation_mode == "drop":
            report.drop(TOO_LONG)
            return None
        if options.truncation_mode == "keep_end":
            if longest >= limit:
                report.drop(NO_PROMPT_LEFT)
                return None
            prompt = prompt[longest - limit :]
        else:
            if len(prompt) >= limit:
                report.drop(PROMPT_FILLS)
                return None
            completions = [ids[: limit - len(prompt)] for ids in completions]
            report.cut_completions += 1
        report.cut += 1
    if not prompt or not all(completions):
        report.drop(NOTHING_TRAINED)
        return None
    trained = sum(map(len, completions))
    report.keep(len(prompt) * len(completions) + trained, trained, len(prompt) + max(map(len, completions)))
    return prompt, completions


ROW_MAKERS: dict[str, Maker] = {
    "text": _text_rows,
    "prompt_completion": _completion_rows,
    "messages": _message_rows,
    "preference": _preference_rows,
    "binary": _binary_rows,
    "prompt": _prompt_rows,
}
