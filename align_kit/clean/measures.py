"""What the quality rules measure of a text: counts and shares, each as its paper defines it.

Words are those between white space, of scripts without spaces their characters; lines and paragraphs are those with
something in them. A measure that means nothing for a text, such as stop words of a language without a list, is None.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from functools import cached_property

from align_kit.clean.words import is_spaceless, words

# Two of these stand in any English text (Rae 2021, app. A.1.1); for the other languages, words as frequent there.
STOP_WORDS = {
    "en": {"the", "be", "to", "of", "and", "that", "have", "with"},
    "de": {"der", "die", "und", "in", "zu", "das", "ist", "mit"},
    "fr": {"le", "la", "de", "et", "les", "des", "que", "est"},
    "es": {"el", "la", "de", "y", "que", "en", "los", "con"},
    "it": {"il", "la", "di", "e", "che", "in", "per", "con"},
    "nl": {"de", "het", "een", "en", "van", "dat", "is", "met"},
    "pt": {"o", "a", "de", "e", "que", "em", "os", "com"},
}
_TERMINAL = (".", "?", "!", '"', "'", "”", "’", "…", "。", "？", "！")
_BULLETS = ("•", "‣", "▪", "●", "○", "◦", "-", "*", "–", "·")
_ELLIPSES = ("...", "…", ". . .")
_SYMBOL = re.compile(r"#|\.\.\.|…")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]”’]*(?=\s|$)|[。！？]")
_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPH = re.compile(r"\n{2,}")
_SHORTEST_LINE = 5  # words: a shorter line is none of running text (Raffel 2020)
_NOT_PROSE = ("javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
              "use cookies")  # fmt: skip


class Text:
    """A text and what measures share of it, each computed once."""

    def __init__(self, text: str, language: str = "en") -> None:
        self.text, self.language = text, language

    @cached_property
    def spaceless(self) -> bool:
        return is_spaceless(self.text)

    @cached_property
    def words(self) -> list[str]:
        return words(self.text) if self.spaceless else self.text.split()

    @cached_property
    def lower(self) -> str:
        return self.text.lower()

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part for part in map(str.strip, _PARAGRAPH.split(self.text)) if part]

    @cached_property
    def characters(self) -> int:
        """Characters of the words, which shares of repeated characters refer to."""
        return sum(map(len, self.words)) or 1

    @cached_property
    def repeats(self) -> bool:
        """Whether any run of five words comes twice; where none does, no longer one can."""
        return len(set(self.grams(5))) < max(0, len(self.words) - 4)

    def grams(self, length: int) -> zip[tuple[str, ...]]:
        """Return the runs of `length` words, in order."""
        return zip(*(itertools.islice(self.words, start, None) for start in range(length)), strict=False)


def word_count(text: Text, _: object) -> float:
    return len(text.words)


def mean_word_length(text: Text, _: object) -> float | None:
    return None if text.spaceless or not text.words else text.characters / len(text.words)


def symbols_per_word(text: Text, _: object) -> float | None:
    """Hash signs and ellipses by words."""
    return len(_SYMBOL.findall(text.text)) / len(text.words) if text.words else None


def bullet_lines(text: Text, _: object) -> float:
    return _share(text.lines, lambda line: line.startswith(_BULLETS))


def ellipsis_lines(text: Text, _: object) -> float:
    return _share(text.lines, lambda line: line.endswith(_ELLIPSES))


def words_with_a_letter(text: Text, _: object) -> float:
    if not text.words:
        return 0.0
    mixed = [word for word in text.words if not word.isalpha()]
    return (len(text.words) - len(mixed) + sum(1 for word in mixed if _LETTER.search(word))) / len(text.words)


def stop_words(text: Text, _: object) -> float | None:
    """How many stop words the text holds, one that comes twice counted twice."""
    known = STOP_WORDS.get(text.language)
    return None if known is None or text.spaceless else sum(1 for word in text.lower.split() if word in known)


def duplicate_lines(text: Text, _: object) -> float:
    return _repeated(text.lines)


def duplicate_paragraphs(text: Text, _: object) -> float:
    return _repeated(text.paragraphs)


def characters_in_duplicate_lines(text: Text, _: object) -> float:
    return _characters_repeated(text.lines)


def characters_in_duplicate_paragraphs(text: Text, _: object) -> float:
    return _characters_repeated(text.paragraphs)


def top_gram(text: Text, length: int) -> float:
    """Share of the characters that the most frequent run of `length` words covers; one that comes once covers none."""
    counted = Counter(text.grams(length))
    times = max(counted.values(), default=0)
    if times < 2:
        return 0.0
    return max(times * sum(map(len, gram)) for gram, count in counted.items() if count == times) / text.characters


def duplicate_grams(text: Text, length: int) -> float:
    """Share of the characters in runs of `length` words that have come before, each character counted once."""
    if not text.repeats:
        return 0.0
    seen: set[tuple[str, ...]] = set()
    covered, reached = 0, 0  # words before `reached` are counted already
    for start, gram in enumerate(text.grams(length)):
        if gram in seen:
            covered += sum(map(len, text.words[max(start, reached) : start + length]))
            reached = start + length
        seen.add(gram)
    return covered / text.characters


def holds(text: Text, phrase: str) -> float:
    """How often the phrase stands in the text, in any case."""
    return text.lower.count(phrase)


def sentences(text: Text, _: object) -> float:
    """Sentences in lines of running text: of five words or more, and no notice on scripts, cookies or terms."""
    return sum(_sentences(line) for line in text.lines if text.spaceless or _is_prose(line))


def lines_ending_in_punctuation(text: Text, _: object) -> float:
    return _share(text.lines, lambda line: line.endswith(_TERMINAL))


def lines_shorter_than(text: Text, characters: int) -> float:
    return _share(text.lines, lambda line: len(line) < characters)


def ends_in_terminal_mark(text: Text, _: object) -> float:
    """1 where the text ends in a full stop, a question or exclamation mark or a quotation mark, 0 where it does not."""
    return float(text.text.endswith(_TERMINAL) and not text.text.endswith(_ELLIPSES))


def notices(text: Text, _: object) -> float:
    """How many phrases of notices on scripts, cookies and terms stand in the text."""
    return sum(text.lower.count(phrase) for phrase in _NOT_PROSE)


def _is_prose(line: str) -> bool:
    if line.count(" ") < _SHORTEST_LINE - 1:
        return False
    lower = line.lower()
    return not any(phrase in lower for phrase in _NOT_PROSE)


def _sentences(line: str) -> int:
    return len(_SENTENCE_END.findall(line))


def _share(items: list[str], is_one: Callable[[str], bool]) -> float:
    return sum(map(is_one, items)) / len(items) if items else 0.0


def _repeated(items: list[str]) -> float:
    return 1 - len(set(items)) / len(items) if items else 0.0


def _characters_repeated(items: list[str]) -> float:
    unique = set(items)
    if len(unique) == len(items):
        return 0.0
    whole = sum(map(len, items))
    return 1 - sum(map(len, unique)) / whole


Measure = Callable[[Text, object], float | None]
MEASURES: dict[str, Callable[..., float | None]] = {
    "words": word_count,
    **{
        measure.__name__: measure
        for measure in (
            mean_word_length, symbols_per_word, bullet_lines, ellipsis_lines, words_with_a_letter, stop_words,
            duplicate_lines, duplicate_paragraphs, characters_in_duplicate_lines, characters_in_duplicate_paragraphs,
            top_gram, duplicate_grams, holds, sentences, lines_ending_in_punctuation, lines_shorter_than,
            ends_in_terminal_mark, notices,
        )
    },
}  # fmt: skip
