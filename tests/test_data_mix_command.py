"""`align-kit data mix`: writes what training would have mixed, from files larger than memory, and says what it did."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from align_kit.cards import read_card
from align_kit.clean.mixing import _word
from align_kit.cli import main
from align_kit.data.lines import JsonLines
from align_kit.data.load import load
from align_kit.errors import UserError
from tests.test_data_mix import rows, three

__all__ = ["three"]  # the fixture


def mix(*words: str) -> int:
    return main(["data", "mix", *map(str, words)])


def written(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


WORDS = [
    ("a.jsonl", ("a.jsonl", None, None)),
    ("a.jsonl:0.7", ("a.jsonl", None, 0.7)),
    ("card:gsm8k", ("card:gsm8k", None, None)),
    ("card:gsm8k:3", ("card:gsm8k", None, 3)),
    ("card:gsm8k[test]:1e-1", ("card:gsm8k", "test", 0.1)),
    ("card:gsm8k[train[:90%]]", ("card:gsm8k", "train[:90%]", None)),
    ("a.jsonl[:90%]:.5", ("a.jsonl", "train[:90%]", 0.5)),
    ("card:2024", ("card:2024", None, None)),
]


@pytest.mark.parametrize("text, parts", WORDS, ids=[text for text, _ in WORDS])
def test_a_word_names_a_source_its_split_and_its_weight(text: str, parts: tuple) -> None:
    word = _word(text)
    assert (word.path, word.split, word.weight) == parts


def test_what_is_written_is_what_training_would_have_mixed(three: list[str], tmp_path: Path) -> None:
    """Row by row: a run on the set sees the rows of a run on the entries, in their order."""
    (a, b, c), out = three, tmp_path / "out"
    assert mix(f"{a}:0.5", f"{b}:0.3", f"{c}:0.2", "--epochs", "1,1,3", "--seed", "7", "--output", out) == 0
    specs = [{"path": a, "weight": 0.5}, {"path": b, "weight": 0.3}, {"path": c, "weight": 0.2, "epochs": 3}]
    mixed_in_training = load(specs, phase="sft", seed=7)
    assert load([{"path": str(out / "out.md")}], phase="sft").digest == mixed_in_training.digest


def test_sources_in_memory_and_on_disk_are_mixed_alike(three: list[str], tmp_path: Path) -> None:
    a, b, _ = three
    whole = tmp_path / "b.json"  # read whole, whereas JSON lines are read row by row
    whole.write_text(json.dumps([json.loads(line) for line in Path(b).read_text().splitlines()]))
    for out, second in (("one", b), ("two", whole)):
        assert mix(a, second, "card:sums_sft[test]", "--temperature", "3", "--output", tmp_path / out) == 0
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_the_table_and_the_card_say_what_came_of_each_source(three: list[str], tmp_path: Path, capsys) -> None:
    (a, _, c), out = three, tmp_path / "out"
    assert mix(f"{a}:0.7", f"{c}:0.3", "--output", out) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split("  ")[0] == "source"
    assert said[1].split() == [a, "100", "70.0%", "69.7%", "23", "0.23", "77"]
    assert said[2].split() == [c, "10", "30.0%", "30.3%", "10", "1", "0", "used", "up"]
    assert said[3].split() == ["all", "110", "33"]
    card = read_card(out / "out.md")
    assert card.block.made.seed == 0 and [one.rows for one in card.block.made.sources] == [100, 10]
    digests = [one.digest for one in load([{"path": a}, {"path": c}], phase="sft").sources]
    assert [one.digest for one in card.block.made.sources] == digests
    assert f"| {c} | 10 | 30.0% | 30.3% | 10 | 1 | 0 | used up |" in card.body
    assert set(card.block.phases) == {"sft", "ppo"} and card.licences == ("unknown",)


def test_a_number_of_rows_is_met_or_refused(three: list[str], tmp_path: Path, capsys) -> None:
    (a, _, c), out = three, tmp_path / "out"
    asked = (f"{a}:0.7", f"{c}:0.3", "--rows", "100", "--output", str(out))
    assert mix(*asked) == 2
    said = f"{c}: its share of 100 rows is 30, and it may give 10; give --rows 33 or fewer, or let it repeat: --epochs"
    assert said in capsys.readouterr().err
    assert not out.exists()
    assert mix(*asked, "--epochs", "1,3") == 0
    found = Counter(row["prompt"] for row in written(out))
    assert sum(found.values()) == 100 and found["c 4"] == 3
    assert mix(a, c, "--rows", "11", "--output", tmp_path / "few") == 0  # by size, where no shares are asked
    assert Counter(row["prompt"][0] for row in written(tmp_path / "few")) == {"a": 10, "c": 1}


def test_made_again_it_is_the_same_and_another_seed_makes_another(three: list[str], tmp_path: Path) -> None:
    texts = []
    for out, seed in (("one", 1), ("two", 1), ("three", 2)):
        assert mix(*three, "--max-share", "0.4", "--epochs", "2", "--seed", seed, "--output", tmp_path / out) == 0
        texts.append((tmp_path / out / "train.jsonl").read_bytes())
    assert texts[0] == texts[1] != texts[2]


MISTAKES = [
    (("a.jsonl", "gone.jsonl"), "no data file gone.jsonl"),
    (("a.jsonl", "card:gsm9k"), "unknown card 'gsm9k'"),
    (("a.jsonl", "a.jsonl"), "a.jsonl is named twice"),
    (("a.jsonl", "pairs.jsonl"), "a.jsonl has prompt_completion rows, pairs.jsonl has preference rows"),
    (("a.jsonl:0",), "'0' is no number above 0"),
    (("a.jsonl:0.5", "b.jsonl", "--temperature", "2"), "a weight and a temperature of the mixture were both given"),
    (("a.jsonl", "b.jsonl", "--epochs", "1,2,3"), "--epochs has 3 numbers for 2 sources"),
    (("a.jsonl", "b.jsonl", "--epochs", "x"), "'x' is no number above 0"),
    (("a.jsonl", "b.jsonl", "--max-share", "0.3"), "adds up to 0.6, so 0.4 of the mixture would be nobody's"),
    (("a.jsonl", "b.jsonl", "--rows", "0"), "'0' is no number above 0"),
    (("a.jsonl", "torn.jsonl"), "torn.jsonl, line 3: not JSON"),
    (("a.jsonl[test]",), "a single file has only the split 'train'"),
    (("card:sums_sft[dev]",), "unknown split of card sums_sft 'dev'"),
    (("empty.jsonl",), "empty.jsonl: no rows"),
    (("a.jsonl", "wrong.jsonl"), "wrong.jsonl, line 4: prompt must be"),
]  # fmt: skip


@pytest.mark.parametrize("words, said", MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path: Path, monkeypatch, capsys, words, said) -> None:
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "a.jsonl", 10)
    rows(tmp_path / "b.jsonl", 10)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    (tmp_path / "torn.jsonl").write_text('\ufeff{"question": "q", "answer": "a"}\n\n{"question": ')
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "wrong.jsonl").write_text('\n{"question": "q", "answer": "a"}\n\n{"question": 1, "answer": "a"}\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    assert mix(*words, "--output", "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_source_without_a_weight_beside_others_is_said(three: list[str], tmp_path: Path, capsys) -> None:
    first, second, third = three
    assert mix(f"{first}:0.5", second, f"{third}:2", "--output", tmp_path / "some") == 0
    said = capsys.readouterr().err
    assert said == f"warning: {second}: no weight is given for it, and one for others; its weight is 1\n"
    assert mix(first, second, "--output", tmp_path / "none") == 0
    assert "weight" not in capsys.readouterr().err
    assert mix(f"{first}:0.5", "card:sums_sft", "--output", tmp_path / "card") == 0
    assert "card:sums_sft: no weight is given for it" in capsys.readouterr().err


def test_rows_on_disk_are_found_by_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + '{"n": 0}\n\n{"n": 1}\r\n{"n": 2}', encoding="utf-8")
    lines = JsonLines(path, ["train[1:]"])
    assert len(lines) == 2 and [lines[1], lines[0]] == [{"n": 2}, {"n": 1}] and list(lines) == [{"n": 1}, {"n": 2}]
    lines.close()
    path.write_bytes(b'{"n": 0}\n{"n": "\xe9"}\n[1]\n')
    lines = JsonLines(path, most=3)
    with pytest.raises(UserError, match=r"a.jsonl, line 2: not UTF-8 \(byte 0xe9\)"):
        lines[1]
    with pytest.raises(UserError, match="a.jsonl, line 3: a row must be a JSON object, got list"):
        lines[2]
    lines.close()


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Peak of Python's own memory: a few bytes a row, whatever is in it."""
    path, count = tmp_path / "long.jsonl", 2000
    with path.open("w") as stream:
        for number in range(count):
            stream.write(json.dumps({"text": f"{number} {'words ' * 500}"}) + "\n")
    assert mix(path, "--output", tmp_path / "warm", "--rows", "2") == 0  # imports are no part of it
    tracemalloc.start()
    try:
        assert mix(path, "--output", tmp_path / "out", "--epochs", "2") == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(written(tmp_path / "out")) == 2 * count
    assert peak < path.stat().st_size / 5
