"""Sets that commands make: what is written is read back, whole or not at all, with a card that tells no lie."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_kit import __version__, cards
from align_kit.data.digest import rows_digest
from align_kit.data.load import load
from align_kit.data.made import MadeSet, check_free, size_category, write_made
from align_kit.errors import UserError
from tests.data_rows import assistant, user

Row = dict[str, Any]
MADE = {"command": ["align-kit", "data", "clean", "a b.jsonl"], "seed": 3}
ROWS = [{"prompt": f"{n} + 1?", "completion": f"{n + 1}"} for n in range(5)]


def made_set(**given: Any) -> MadeSet:
    """Return what is known of a small set, with `given` in place of some of it."""
    known: dict[str, Any] = {
        "name": "tidy", "pretty_name": "Tidy", "licences": ("mit",), "phases": ("sft",),
        "format": "prompt_completion", "made": MADE,
    }  # fmt: skip
    return MadeSet(**{**known, **given})


def read(card: Path, phase: str = "sft", split: str = "train") -> list[Row]:
    """Return the canonical rows that a run would train on."""
    return load([{"path": str(card), "split": split}], phase=phase).dataset.to_list()


KINDS = [
    ("pretrain", "text", {"text": "one\u2028line, two\nlines"}),
    ("sft", "prompt_completion", {"prompt": "p", "completion": "ünïcode 漢字"}),
    ("sft", "messages", {"messages": [user("hi"), assistant("ho")]}),
    ("dpo", "preference", {"prompt": "p", "chosen": "c", "rejected": "r"}),
    ("kto", "binary", {"prompt": "p", "completion": "c", "label": False}),
    ("ppo", "prompt", {"prompt": "p", "answer": "4"}),
]


@pytest.mark.parametrize("phase, kind, row", KINDS, ids=[kind for _, kind, _ in KINDS])
def test_every_kind_is_read_back_as_it_was_given(tmp_path: Path, phase: str, kind: str, row: Row) -> None:
    card = write_made(tmp_path / "set", made_set(phases=(phase,), format=kind), {"train": [row, row]})
    assert read(card, phase) == [row, row]


def test_columns_and_template_say_how_rows_of_their_own_shape_are_read(tmp_path: Path) -> None:
    rows = [{"id": 7, "answer": "four", "question": "2 + 2?"}]
    shape = {"columns": {"prompt": "question", "completion": "answer"}, "prompt_template": "{prompt}\n"}
    card = write_made(tmp_path / "set", made_set(**shape), {"train": rows})
    assert (tmp_path / "set" / "train.jsonl").read_text() == json.dumps(rows[0]) + "\n"  # keys in the order given
    assert read(card) == [{"prompt": "2 + 2?\n", "completion": "four"}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.text(), JSON), min_size=1, max_size=5))
def test_any_row_that_json_holds_comes_back(tmp_path_factory: pytest.TempPathFactory, pairs: list[Any]) -> None:
    rows = [{"text": text, "more": more} for text, more in pairs]
    folder = tmp_path_factory.mktemp("made") / "set"
    write_made(folder, made_set(phases=("pretrain",), format="text"), {"train": rows})
    lines = (folder / "train.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == rows and lines[-1] == b""


def test_half_a_surrogate_pair_is_kept_beside_what_is_trained_on_and_refused_in_it(tmp_path: Path) -> None:
    row = {"text": "whole", "note": "broken \ud83d emoji"}
    given = made_set(phases=("pretrain",), format="text")
    write_made(tmp_path / "set", given, {"train": [row]})
    assert json.loads((tmp_path / "set" / "train.jsonl").read_bytes()) == row
    with pytest.raises(UserError, match=r"train, row 2: text holds half a character \(.ud83d\)"):
        write_made(tmp_path / "other", given, {"train": [row, {"text": "broken \ud83d emoji"}]})
    assert not (tmp_path / "other").exists()


def test_the_card_tells_rows_digests_and_origin(tmp_path: Path) -> None:
    origin = {"card": "gsm8k", "split": "train", "digest": rows_digest(ROWS), "rows": 5}
    given = made_set(
        filters=[{"name": "words", "rule": "at least 3 words", "threshold": 3, "dropped": 2}],
        decontamination=[{"against": "card:gsm8k[test]", "n": 13, "dropped": 1}],
        pii={"email": 4}, stats={"near_duplicates": 2}, made={**MADE, "teacher": "a model", "from": [origin]},
        sections={"Uses": "Only for tests."}, languages=("en",),
    )  # fmt: skip
    file = write_made(tmp_path / "set", given, {"train": ROWS, "test": ROWS[:2]})
    card = cards.read_card(file)
    characters = sum(len(row["prompt"]) + len(row["completion"]) for row in ROWS)
    assert card.block.stats["rows"] == {"train": 5, "test": 2} and card.block.stats["near_duplicates"] == 2
    assert card.block.stats["characters"]["train"] == characters
    data = (file.parent / "train.jsonl").read_bytes()
    assert card.block.source.sha256["train.jsonl"] == hashlib.sha256(data).hexdigest()
    assert card.block.made is not None and card.block.made.align_kit == __version__ and card.block.made.seed == 3
    sections = card.sections()
    assert tuple(sections) == cards.HEADINGS and all(sections.values())
    assert sections["Uses"] == "Only for tests." and "align-kit data clean" in sections["Motivation"]
    assert "at least 3 words" in sections["Preprocessing"] and "email: 4 places" in sections["Preprocessing"]
    assert "card `gsm8k`" in sections["Collection"] and "5 rows" in sections["Collection"]
    assert card.front["size_categories"] == ["n<1K"] and card.warnings() == []


def test_what_is_counted_on_the_way_is_in_the_card(tmp_path: Path) -> None:
    filters: list[Row] = []
    pii: dict[str, int] = {}

    def rows() -> Iterator[Row]:
        yield from ROWS
        filters.append({"name": "late", "dropped": 9})
        pii["phone"] = 2

    block = cards.read_card(write_made(tmp_path / "set", made_set(filters=filters, pii=pii), {"train": rows()})).block
    assert block.filters[0].dropped == 9 and block.pii == {"phone": 2}


def test_one_flipped_byte_is_one_line(tmp_path: Path) -> None:
    card = write_made(tmp_path / "set", made_set(), {"train": ROWS})
    file = card.with_name("train.jsonl")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match="sha256 is") as caught:
        read(card)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_a_set_can_be_moved_and_named_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = write_made(tmp_path / "one" / "set", made_set(), {"train": ROWS})
    shutil.move(card.parent, tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    assert read(Path("two/tidy.md")) == ROWS
    assert load([{"path": "card:two/tidy.md"}], phase="sft").dataset.to_list() == ROWS


@pytest.mark.parametrize("licences, front", [
    (("mit",), {"license": "mit"}), (("psf-2.0",), {"license": "other", "license_name": "psf-2.0"}),
    (("mit", "psf-2.0"), {"license": ["mit", "psf-2.0"]}), ((), {"license": "unknown"}),
])  # fmt: skip
def test_licences_are_written_as_the_hub_reads_them(tmp_path: Path, licences: tuple[str, ...], front: Row) -> None:
    card = cards.read_card(write_made(tmp_path / "set", made_set(licences=licences), {"train": ROWS}))
    assert card.licences == (licences or ("unknown",)) and front.items() <= card.front.items()


def test_a_split_without_rows_is_left_out_and_said(tmp_path: Path) -> None:
    card = write_made(tmp_path / "set", made_set(), {"train": ROWS, "test": []})
    assert sorted(path.name for path in card.parent.iterdir()) == ["tidy.md", "train.jsonl"]
    assert list(cards.read_card(card).block.splits) == ["train"]
    assert "`test`: no row was left" in cards.read_card(card).sections()["Composition"]


def test_rows_pass_through_and_do_not_pile_up(tmp_path: Path) -> None:
    class Watched(dict[str, Any]):
        """A row that a weak reference can follow."""

    rows: list[weakref.ref[Watched]] = []
    alive: list[int] = []

    def streamed() -> Iterator[Row]:
        for number in range(200):
            row = Watched(text=f"row {number}")
            rows.append(weakref.ref(row))
            yield row
            del row
            alive.append(sum(one() is not None for one in rows))

    write_made(tmp_path / "set", made_set(phases=("pretrain",), format="text"), {"train": streamed()})
    assert len(alive) == 200 and max(alive) <= 2


def test_a_file_beside_the_splits_is_moved_in(tmp_path: Path) -> None:
    dropped = tmp_path / "draft"
    dropped.write_text('{"reason": "short"}\n')
    card = write_made(tmp_path / "set", made_set(), {"train": ROWS}, beside={"dropped.jsonl": dropped})
    assert card.with_name("dropped.jsonl").read_text() == '{"reason": "short"}\n' and not dropped.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("line 3: not JSON"), OSError(28, "No space left")])
def test_an_interrupted_set_is_not_there(tmp_path: Path, error: BaseException) -> None:
    def rows() -> Iterator[Row]:
        yield from ROWS
        raise error

    with pytest.raises(BaseException):  # noqa: B017 - each of them goes through
        write_made(tmp_path / "new", made_set(), {"train": rows()})
    assert list(tmp_path.iterdir()) == []
    old = write_made(tmp_path / "set", made_set(), {"train": ROWS})
    with pytest.raises(BaseException):  # noqa: B017
        write_made(tmp_path / "set", made_set(), {"train": rows()}, overwrite=True)
    assert read(old) == ROWS and list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_overwrite_replaces_all_of_a_set(tmp_path: Path) -> None:
    write_made(tmp_path / "set", made_set(), {"train": ROWS, "test": ROWS})
    card = write_made(tmp_path / "set", made_set(name="other"), {"train": ROWS[:1]}, overwrite=True)
    assert sorted(path.name for path in card.parent.iterdir()) == ["other.md", "train.jsonl"] and read(card) == ROWS[:1]
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def _strange(folder: Path) -> None:
    write_made(folder, made_set(), {"train": ROWS})
    (folder / "thesis.docx").write_text("years of work")


def _file(place: Path) -> Path:
    place.write_text("x")
    return place


def _by_hand(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.md").write_text("# Notes\n")


@pytest.mark.parametrize("prepare, overwrite, said", [
    (_by_hand, False, "is not empty; name another folder"),
    (_by_hand, True, "it holds no card of one"),
    (_strange, True, "it holds thesis.docx"),
    (_file, True, "is a file; name a folder"),
], ids=["not empty", "by hand", "strange", "file"])  # fmt: skip
def test_what_was_not_written_here_is_not_replaced(
    tmp_path: Path, prepare: Callable[[Path], Any], overwrite: bool, said: str
) -> None:
    prepare(tmp_path / "set")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said):
        check_free(tmp_path / "set", overwrite=overwrite)
    with pytest.raises(UserError, match=said):
        write_made(tmp_path / "set", made_set(), {"train": ROWS}, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_room_to_write_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write to .*file/set: File exists"):
        write_made(_file(tmp_path / "file") / "set", made_set(), {"train": ROWS})
    small = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, small[1]))
    try:
        with pytest.raises(UserError, match=f"cannot write to {tmp_path}/set: File too large; nothing was written"):
            write_made(tmp_path / "set", made_set(), {"train": ROWS * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, small)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


MISTAKES: list[tuple[Row, Any, str]] = [
    ({}, {"train": []}, "no row is left to write"),
    ({}, {"train": [ROWS[0], {"prompt": "p"}]}, "train, row 2: .*completion"),
    ({}, {"train": [{**ROWS[0], "seen": {1, 2}}]}, "train, row 1: JSON cannot hold it"),
    ({}, {"train": [{**ROWS[0], "score": float("nan")}]}, "train, row 1: JSON cannot hold it"),
    ({}, {"../train": ROWS}, "cannot name a split '../train'"),
    ({"name": "a/b"}, {"train": ROWS}, "cannot name a card 'a/b'"),
    ({"name": "README"}, {"train": ROWS}, "cannot name a card 'README'"),
    ({"phases": ("dpo",)}, {"train": ROWS}, "phase 'dpo' cannot use format 'prompt_completion'"),
    ({"filters": [{"name": "x", "dropped": -1}]}, {"train": ROWS}, "filters.0.dropped"),
    ({"made": {"seed": 1}}, {"train": ROWS}, "made.command: Field required"),
    ({"sections": {"Purpose": "x"}}, {"train": ROWS}, "no section 'Purpose'; it has Motivation"),
]


@pytest.mark.parametrize("given, splits, said", MISTAKES, ids=[said[:30] for _, _, said in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path, given: Row, splits: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        write_made(tmp_path / "set", made_set(**given), splits)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_mistake_in_what_is_known_is_met_before_the_first_row(tmp_path: Path) -> None:
    def rows() -> Iterator[Row]:
        raise AssertionError("a row was asked for")
        yield {}

    with pytest.raises(UserError, match=r"pii\.email"):
        write_made(tmp_path / "set", made_set(pii={"email": -1}), {"train": rows()})


def test_sizes_are_the_hubs() -> None:
    names = [size_category(rows) for rows in (1, 999, 1000, 99_999, 10**6, 10**10, 10**13)]
    assert names == ["n<1K", "n<1K", "1K<n<10K", "10K<n<100K", "1M<n<10M", "10B<n<100B", "n>1T"]
