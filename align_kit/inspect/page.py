"""The same as a page: the checks first, then the rows, then how long they are."""

from __future__ import annotations

from collections.abc import Iterator

from align_kit.inspect import terminal
from align_kit.inspect.decode import Decoder, Span, shortened
from align_kit.inspect.seen import Seen
from align_kit.inspect.trace import Strip
from align_kit.report.page import Page

LOOKS = {"masked": "dim", "TRAINED": "green", "read": "blue", "cut off": "struck"}  # state -> look
WIDTH = 100  # columns of a histogram
SHOWN = 4000  # characters of a span


def page(seen: Seen) -> Page:
    """Return what was seen of a split of a run's data as a page."""
    made = Page(f"What {seen.recipe.name} trains on", seen.split.sentence())
    made.section("Checks")
    made.table(("", "", ""), [[check.state, check.name, check.what] for check in seen.checks])
    made.section("Rows")
    made.text(f"{seen.start.name}: {seen.words_sentence()}")
    for strip in seen.strips:
        made.text(strip.title)
        made.marked(list(_parts(strip, seen.decoder)))
    made.section("Lengths in tokens")
    made.table(terminal.QUANTILES, terminal.quantiles(seen.labels.lengths))
    if bars := seen.histogram(WIDTH):
        made.code("\n".join(bars))
    return made


def _parts(strip: Strip, decoder: Decoder) -> Iterator[tuple[str, str]]:
    for span in strip.spans:
        yield f"{span.part}, {span.state}\n", "label"
        yield from _looks(span, decoder)
        yield "\n", "plain"
    if strip.notes:
        yield "\n".join(strip.notes), "label"


def _looks(span: Span, decoder: Decoder) -> Iterator[tuple[str, str]]:
    for piece in shortened(decoder.pieces(span), SHOWN):
        yield piece.text, "boxed" if piece.look == "token" else LOOKS[span.state]
