"""Rules of quality and forms of personal data, each by texts that keep it and texts that break it."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_kit.clean import measures
from align_kit.clean.measures import MEASURES, Text
from align_kit.clean.options import FILTERS
from align_kit.clean.parts import learnt, parts
from align_kit.clean.personal import KINDS, masked_text
from align_kit.clean.rules import broken, cited, cut, load_rules
from align_kit.errors import UserError

MEASURED = [
    ("words", None, "one two  three\nfour", 4),
    ("words", None, "我喜欢吃米饭。", 6),
    ("mean_word_length", None, "ab abcd", 3),
    ("mean_word_length", None, "我喜欢吃米饭", None),
    ("symbols_per_word", None, "a # b... c…", 3 / 4),
    ("bullet_lines", None, "- a\n• b\nc\n\n* d", 3 / 4),
    ("ellipsis_lines", None, "a...\nb…\nc", 2 / 3),
    ("words_with_a_letter", None, "a 1 b2 ---", 0.5),
    ("stop_words", None, "The cat and the dog", 3),
    ("duplicate_lines", None, "a\nb\na\na", 0.5),
    ("duplicate_paragraphs", None, "a b\n\nc\n\na b", 1 / 3),
    ("characters_in_duplicate_lines", None, "abc\nd\nabc", 3 / 7),
    ("top_gram", 2, "a b c a b", 4 / 5),
    ("top_gram", 2, "a b c d e", 0),
    ("duplicate_grams", 5, "a b c d e x a b c d e", 5 / 11),
    ("duplicate_grams", 5, "a a a a a a a a", 7 / 8),
    ("duplicate_grams", 5, "a b c d", 0),
    ("holds", "lorem ipsum", "Lorem Ipsum dolor", 1),
    ("sentences", None, "This is one whole line. And here is another!\nShort one.\nWe use JavaScript on any page.", 2),
    ("lines_ending_in_punctuation", None, "a.\nb\nc!\nd\"", 3 / 4),
    ("ends_in_terminal_mark", None, 'He said "yes"', 1),
    ("ends_in_terminal_mark", None, "and so on...", 0),
    ("ends_in_terminal_mark", None, "Home | About", 0),
    ("notices", None, "Enable JavaScript. We use cookies; see our privacy policy.", 3),
    ("lines_shorter_than", 3, "ab\nabc\na", 2 / 3),
]  # fmt: skip


@pytest.mark.parametrize("measure, of, text, value", MEASURED, ids=[f"{row[0]}-{row[2][:8]!r}" for row in MEASURED])
def test_measures(measure: str, of: object, text: str, value: float | None) -> None:
    assert MEASURES[measure](Text(text), of) == (None if value is None else pytest.approx(value))


def test_every_measure_is_measured() -> None:
    assert {row[0] for row in MEASURED} | {"characters_in_duplicate_paragraphs"} == set(MEASURES)


@given(st.lists(st.sampled_from(["aa", "b", "c"]), max_size=40), st.integers(5, 10))
def test_duplicate_grams_count_each_word_once(words: list[str], length: int) -> None:
    seen, covered = set(), set()
    for start in range(len(words) - length + 1):
        gram = tuple(words[start : start + length])
        covered |= set(range(start, start + length)) if gram in seen else set()
        seen.add(gram)
    share = sum(len(words[place]) for place in covered) / (sum(map(len, words)) or 1)
    assert measures.duplicate_grams(Text(" ".join(words)), length) == pytest.approx(share)


@settings(max_examples=30)
@given(st.text())
def test_no_text_breaks_a_measure(text: str) -> None:
    for rule in load_rules(FILTERS):
        value = rule.measured(Text(text))
        assert value is None or value >= 0


def test_rules_are_those_that_were_published() -> None:
    """Thresholds as in Rae 2021, table A1 and app. A.1.1; Raffel 2020, sec. 2.2; Penedo 2024, sec. 3.6."""
    rules = {(rule.set, rule.name): rule for rule in load_rules(FILTERS)}
    for length, most in enumerate((0.20, 0.18, 0.16), start=2):
        assert rules["gopher", f"top_{length}_gram"].max == most and rules["gopher", f"top_{length}_gram"].of == length
    for length, most in enumerate((0.15, 0.14, 0.13, 0.12, 0.11, 0.10), start=5):
        assert rules["gopher", f"duplicate_{length}_grams"].max == most
    assert rules["gopher", "words"].bounds == "50 to 100000"
    assert rules["c4", "sentences"].bounds == "at least 3"
    assert rules["fineweb", "lines_ending_in_punctuation"].bounds == "more than 0.12"
    assert rules["fineweb", "characters_in_repeated_lines"].bounds == "less than 0.1"
    assert all("20" in cited(name) for name in ("gopher", "c4", "fineweb"))


PAGE = """Home | About | Contact us today

Our site uses cookies to make it better for you.
The first paragraph has a line that is whole.
Read more.


It goes on after the menu, in a second paragraph!
Copyright of nobody in the year of the test"""


def test_lines_are_cut_as_c4_would() -> None:
    """Raffel 2020, sec. 2.2: a line stays that ends in a terminal mark, has five words and is no notice."""
    rules = load_rules(["c4_lines"])
    text, hits = cut(PAGE, rules)
    assert text == "The first paragraph has a line that is whole.\n\nIt goes on after the menu, in a second paragraph!"
    assert [rule.full_name.partition(".")[2] for rule in hits] == ["terminal_mark", "notices", "words", "terminal_mark"]
    assert cut(text, rules) == (text, [])
    untouched = "  A line with its own spaces stays as it was.\n\n\n\nAnd so does the space between these.  "
    assert cut(untouched, rules) == (untouched, [])


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["", "  ", "This line is a whole one.", "menu", "We use cookies on all our pages."])))
def test_cutting_keeps_good_lines_in_order_and_is_done_once(lines: list[str]) -> None:
    rules = load_rules(["c4_lines"])
    text, hits = cut("\n".join(lines), rules)
    assert text.count("This line is a whole one.") == lines.count("This line is a whole one.")
    assert len(hits) == sum(line in ("menu", "We use cookies on all our pages.") for line in lines)
    assert cut(text, rules) == (text, []) and (not hits or text == text.strip())


def test_bounds_include_what_they_should() -> None:
    ending = next(rule for rule in load_rules(["fineweb"]) if rule.name == "lines_ending_in_punctuation")
    assert ending.is_broken(Text("\n".join(["a."] * 12 + ["b"] * 88)))  # 0.12 is not more than 0.12
    assert not ending.is_broken(Text("\n".join(["a."] * 13 + ["b"] * 87)))
    words = next(rule for rule in load_rules(["gopher"]) if rule.name == "words")
    assert words.is_broken(Text("a " * 49)) and not words.is_broken(Text("a " * 50))


def test_stop_words_go_by_language() -> None:
    german = "Der Hund und die Katze sind in dem Haus. " * 8
    names = [rule.name for rule in broken(Text(german, "de"), load_rules(["gopher"])) if rule.name == "stop_words"]
    assert not names and measures.stop_words(Text(german, "xx"), None) is None
    assert "stop_words" in [rule.name for rule in broken(Text(german), load_rules(["gopher"]))]


@pytest.mark.parametrize(
    "content, said",
    [
        ("gopher: 3", "gopher must be a mapping of rules"),
        ("gopher: {words: 3}", "gopher.words must be a mapping"),
        ("gopher: {words: {mn: 3}}", "unknown field of rule gopher.words 'mn'.*did you mean 'min'"),
        ("gopher: {words: {min: many}}", "rule gopher.words: min must be a number, got 'many'"),
        ("mine: {words: {min: 3}}", "has rules of 'mine', which is not among --filters gopher,c4,fineweb,answers"),
        ("for: {a: {gofer: {}}}", "has rules of 'gofer'"),
        ("gopher: {wrods: {min: 3}}", "unknown measure of rule gopher.wrods 'None'"),
        ("- 1", "rules are a mapping of sets"),
        ("{", "not YAML"),
    ],
)
def test_mistakes_in_rules_are_named(tmp_path, content: str, said: str) -> None:
    (tmp_path / "rules.yaml").write_text(content)
    with pytest.raises(UserError, match=said):
        load_rules(FILTERS, str(tmp_path / "rules.yaml"))


PERSONAL = [
    ("mail a.b+c@d.example.org.", "mail <email>."),
    ("not@home, a@b", "not@home, a@b"),
    ("call +44 20 7946 0958 now", "call <phone> now"),
    ("(555) 234-5678 or 213-484-0480", "<phone> or <phone>"),
    ("1 + 234 + 567 + 8901, 2020-12-12, ISBN 978-3-16-148410-0", None),
    ("3.14159, 1,234,567 and 555-1234", None),
    ("8.8.8.8, 10.0.0.1, 999.1.1.1", "<ip>, 10.0.0.1, 999.1.1.1"),
    ("version 8.8.8.8 and v1.2.3.4 and 1.2.3.4.5", None),
    ("at 2001:4860:4860::8888!", "at <ip>!"),
    ("std::map a::b 12:30:45 fe80::1", None),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY----- end", "<key> end"),
    ("hf_" + "a" * 34 + " and AKIA" + "A" * 16, "<key> and <key>"),
    ("sk-learn and xoxo and hf_hub", None),
]


@pytest.mark.parametrize("text, masked", PERSONAL, ids=[text[:20] for text, _ in PERSONAL])
def test_personal_data_is_told_by_its_form(text: str, masked: str | None) -> None:
    found: Counter[str] = Counter()
    assert masked_text(text, found) == (text if masked is None else masked)
    assert sum(found.values()) == sum((masked or "").count(f"<{kind}>") for kind in KINDS)
    assert masked_text(masked_text(text, Counter()), found_again := Counter()) == (masked or text) and not found_again


@pytest.mark.parametrize("piece", ["a", "1", "1.", "a.", "+1 ", "ab:", "a@", "1-", "eyJ", "a@b.", "@", "(1) "])
def test_no_text_takes_long(piece: str) -> None:
    began = time.process_time()
    masked_text(piece * (200_000 // len(piece)), Counter())
    assert time.process_time() - began < 2


def test_parts_are_what_is_asked_and_what_is_answered() -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "See?"}, {"type": "image"}]},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]},
            {"role": "tool", "content": "a cat"},
            {"role": "assistant", "content": "A cat."},
        ]
    }
    asked, answered = parts("messages", row)
    assert asked == "See?\n\na cat" and '"name":"look"' in answered and answered.endswith("A cat.")
    assert learnt("messages", row, (asked, answered)) == answered
    assert learnt("binary", {"label": False}, ("a", "b")) == "" and learnt("binary", {"label": True}, ("a", "b")) == "b"
    assert learnt("preference", {}, ("a", "b", "c")) == "b"
