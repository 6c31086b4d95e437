"""What `align-kit show` is made of: counts of labels, decoding, wrapping and bars, each held to its definition."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align_kit.data import labels
from align_kit.data.labels import Labels, Words, measure, sentence, share
from align_kit.inspect import terminal
from align_kit.inspect.decode import Decoder, Piece, Span, one_line, shortened, visible
from tests.data_rows import chat_tokenizer

STOP, TURN, BOS, UNKNOWN = 0, 1, 2, 3
WORDS = Words(stops=frozenset([STOP]), control=frozenset([STOP, TURN, BOS]), bos=BOS, eos=STOP, unknown=UNKNOWN)
ids = st.lists(st.integers(0, 6), min_size=2, max_size=9)
masked = ids.flatmap(lambda row: st.tuples(st.just(row), st.lists(st.integers(0, 1), min_size=len(row),
                                                                   max_size=len(row))))  # fmt: skip


def language(rows: Sequence[tuple[list[int], list[int]]]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row for row, _ in rows], "loss_mask": [mask for _, mask in rows]})


def ending(trained: Sequence[int], tokens: set[int]) -> int | None:
    """Return the last of `tokens` among the last three of `trained`."""
    return next((token for token in reversed(trained[-3:]) if token in tokens), None)


@given(st.lists(masked, min_size=1, max_size=12))
@settings(max_examples=60)
def test_labels_are_what_their_definitions_say(rows: list[tuple[list[int], list[int]]]) -> None:
    found = measure(language(rows), "prompt_completion", WORDS)
    trained = [[token for token, on in list(zip(row, mask, strict=True))[1:] if on] for row, mask in rows]
    ends = [ending(one, {STOP}) for one in trained]
    turns = [ending(one, {TURN, BOS}) for one, end in zip(trained, ends, strict=True) if end is None]
    assert found.trained == sum(map(len, trained)) and found.tokens == sum(len(row) for row, _ in rows)
    assert found.ended == Counter(end for end in ends if end is not None)
    assert found.turned == Counter(turn for turn in turns if turn is not None)
    assert found.open == sum(mask[0] for _, mask in rows)
    assert found.double_bos == sum(row[:2] == [BOS, BOS] for row, _ in rows)
    assert found.no_bos == sum(row[0] != BOS for row, _ in rows)
    assert found.unknown == sum(row.count(UNKNOWN) for row, _ in rows)
    assert found.lengths["row"].tolist() == [len(row) for row, _ in rows]


@given(st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=8))
@settings(max_examples=40)
def test_labels_of_pairs_count_each_side(rows: list[tuple[list[int], list[int], list[int]]]) -> None:
    columns = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(list, zip(*rows, strict=True)), strict=True))
    found = measure(Dataset.from_dict(columns), "preference", WORDS)
    sides = [side for _, *both in rows for side in both]
    assert found.sequences == len(sides) and found.trained == sum(map(len, sides))
    assert found.tokens == sum(2 * len(prompt) + len(a) + len(b) for prompt, a, b in rows)
    assert found.ended.total() == sum(ending(side, {STOP}) is not None for side in sides)
    assert sorted(found.lengths["whole"]) == sorted(len(row[0]) + len(side) for row in rows for side in row[1:])
    assert len(found.lengths["prompt"]) == len(rows)


def test_chunks_change_nothing_and_a_sample_says_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = language([([BOS, 5, STOP], [0, 1, 1])] * 7 + [([BOS, BOS, 4], [1, 1, 1])] * 4)
    whole = measure(rows, "messages", WORDS)
    monkeypatch.setattr(labels, "CHUNK", 2)
    parts = measure(rows, "messages", WORDS)
    assert {**vars(whole), "lengths": 0} == {**vars(parts), "lengths": 0}
    few = measure(rows, "messages", WORDS, most=5)
    assert (few.measured, few.rows) == (5, 11)
    assert "(of 5 rows looked at)" in sentence(few, chat_tokenizer(None))


@pytest.mark.parametrize(
    "ended, count, verdict", [(99, 100, "ok"), (98, 100, "NOT the 99%"), (100, 100, "ok"), (0, 100, "NOT the 99%")]
)
def test_the_sentence_of_a_header_says_whether_rows_end(ended: int, count: int, verdict: str) -> None:
    found = Labels("messages", count, count, sequences=count, tokens=1000, trained=250, ended=Counter({2: ended}))
    said = sentence(found, chat_tokenizer(None))
    assert said.startswith("trained on: 25.0% of the tokens; ") and verdict in said


@pytest.mark.parametrize("count, of, shown", [(0, 9, "0.0%"), (9, 9, "100.0%"), (1, 10**6, "0.1%"),
                                              (10**6 - 1, 10**6, "99.9%"), (1, 3, "33.3%")])  # fmt: skip
def test_a_share_is_never_rounded_to_none_or_all(count: int, of: int, shown: str) -> None:
    assert share(count, of).endswith(f"({shown})")


# --- decoding ---------------------------------------------------------------------------------------------------------


@given(st.text(max_size=60))
def test_nothing_unseen_is_left_in_a_text(text: str) -> None:
    for piece in visible(text):
        left = piece.text.replace("↵\n", "")
        assert all(unicodedata.category(char)[0] not in "CZ" or char in " \u200c\u200d" or
                   unicodedata.category(char) == "Zs" for char in left)  # fmt: skip
    assert "\n" not in one_line(text)


@given(st.text(alphabet="ab \n\t.é你\u202e", max_size=60))
def test_what_is_shown_can_be_read_back(text: str) -> None:
    back = {"↵\n": "\n", "·": " ", r"\t": "\t", r"\u202e": "\u202e"}
    joined = "".join(piece.text for piece in visible(text))
    for mark, char in back.items():
        joined = joined.replace(mark, char)
    assert joined == text


def metaspace() -> PreTrainedTokenizerFast:
    """Return a tokenizer that, as SentencePiece does, drops the blank at the start of what it decodes."""
    vocabulary = {word: n for n, word in enumerate(["<unk>", "</s>", "▁one", "▁two", "▁three"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("words", [metaspace(), chat_tokenizer(None)], ids=["metaspace", "bytes"])
@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_spans_are_decoded_as_they_stand_in_their_row(words: PreTrainedTokenizerFast, cut: int) -> None:
    decoder, row = Decoder(words), words("one two three", add_special_tokens=False)["input_ids"]
    parts = [decoder.text(row[:cut]), decoder.text(row[cut:], row[:cut])]
    assert "".join(parts) == "one two three"


def test_control_tokens_are_pieces_of_their_own() -> None:
    words = chat_tokenizer(None)
    end, start = words.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    row = [start, *words("user asks", add_special_tokens=False)["input_ids"], end]
    pieces = Decoder(words).pieces(Span("text", "masked", row))
    assert pieces == [Piece("<|im_start|>", "token"), Piece("user asks"), Piece("<|im_end|>", "token")]


@given(st.lists(st.sampled_from([Piece("abc" * 9), Piece("·", "blank"), Piece("<|end|>", "token")]), max_size=12),
       st.integers(9, 90))  # fmt: skip
def test_a_long_text_keeps_both_ends_and_says_what_is_left_out(pieces: list[Piece], most: int) -> None:
    text = "".join(piece.text for piece in pieces)
    found = shortened(pieces, most)
    if len(text) <= most:
        assert found == pieces
        return
    (gap,) = [piece for piece in found if piece.look == "elided"]
    place = found.index(gap)
    head, tail = ("".join(one.text for one in part) for part in (found[:place], found[place + 1 :]))
    assert text.startswith(head) and text.endswith(tail) and len(head) + len(tail) <= most
    assert f"{len(text) - len(head) - len(tail):,} characters" in gap.text
    assert all(piece.text == "<|end|>" for piece in found if piece.look == "token"), "no control token is cut"


# --- lines ------------------------------------------------------------------------------------------------------------


@given(st.text(alphabet="ab 你é", max_size=200), st.integers(20, 60))
def test_lines_fit_and_hold_the_whole_text(text: str, width: int) -> None:
    found = terminal.folded(text, width)
    assert max((sum(map(terminal.columns, line)) for line in found), default=0) <= width
    assert "".join(found).replace(" ", "") == text.replace(" ", "")


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60), st.lists(st.integers(0, 900), min_size=1, max_size=9))
def test_every_length_is_in_one_bar(first: list[int], second: list[int]) -> None:
    lines = list(terminal.histogram({"a": np.array(first), "b": np.array(second)}, 100))
    if len({*first, *second}) == 1:
        assert not lines
        return
    counts = Counter[str]()
    for line in lines[1:]:
        numbers = [int(word.replace(",", "")) for word in line.split()[1:] if word[0].isdigit()]
        counts["a"] += numbers[0]
        counts["b"] += numbers[1]
        ends = [int(end) for end in line.split()[0].split("–")]
        assert numbers[0] == sum(ends[0] <= one <= ends[-1] for one in first)
        assert numbers[1] == sum(ends[0] <= one <= ends[-1] for one in second)
    assert counts == {"a": len(first), "b": len(second)} and len(lines) <= 2 * terminal.BINS
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize("char, count", [("a", 1), ("你", 2), ("Ａ", 2), ("\u0301", 0), ("\u200d", 0)])
def test_columns_of_a_character(char: str, count: int) -> None:
    assert terminal.columns(char) == count
