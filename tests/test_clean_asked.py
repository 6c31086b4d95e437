"""What `data clean` is asked for and cannot do is said before the work, or counted after it: never passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from align_kit import cards
from align_kit.clean.command import clean
from align_kit.clean.mixing import mix_command
from align_kit.errors import UserError
from align_kit.preferences.command import preferences
from tests.test_clean import cleaned, prose, texts, written


def refused(said: str, *words: str) -> None:
    """Hold a command to one line that says `said`."""
    with pytest.raises(UserError, match=said) as caught:
        clean(list(words))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", [clean, mix_command, preferences])
@pytest.mark.parametrize("words", [["--output", "my out"], ["--output", "out", "--name", "../evil"]])
def test_a_name_that_no_card_can_have_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"cannot name a card '(my out|../evil)'; .*\(--name sets it\)"):
        command(["gone.jsonl", *words])  # which reading would say


def test_a_column_to_keep_is_one_that_rows_have(tmp_path: Path) -> None:
    one = texts(tmp_path / "a.jsonl", prose(0))
    other = written(tmp_path / "b.jsonl", [{"text": prose(1), "url": "u"}])
    out = str(tmp_path / "out")
    refused(r"unknown column .*--keep-columns 'urll'; known: text, url \(did you mean 'url'\?\)",
            one, other, "--output", out, "--keep-columns", "urll")  # fmt: skip
    assert cleaned(tmp_path / "out", one, other, "--keep-columns", "url")[1] == {"text": prose(1), "url": "u"}


def test_rows_that_a_block_list_cannot_hold_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "blocked.txt").write_text("bad.example\n")
    rows = [{"text": prose(0), "link": "bad.example"}, {"text": prose(1), "meta": {"url": "bad.example"}}]
    source = written(tmp_path / "a.jsonl", [*rows, {"text": prose(2), "source": "good.example"}])
    assert len(cleaned(tmp_path / "out", source, "--blocklist", str(tmp_path / "blocked.txt"))) == 2
    assert "1 of 3 rows have none of url, source, domain" in capsys.readouterr().out
    cleaned(tmp_path / "plain", source)
    assert "have none of" not in capsys.readouterr().out


def test_a_language_is_one_that_can_be_told_however_it_is_written(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", "Der Hafen war still, und die Fischer flickten ihre Netze im Abendlicht.")
    for word in ("english", "xx"):
        refused(f"unknown language '{word}'; known: .*, de, .*, zh,", source, "--language", word,
                "--output", str(tmp_path / "no"))  # fmt: skip
    assert len(cleaned(tmp_path / "out", source, "--language", "DE", "--filters", "none")) == 1
    assert "- de\n" in (tmp_path / "out" / "out.md").read_text()
    assert cards.load_card(tmp_path / "out" / "out.md").block.made


def test_a_folder_without_a_training_file_is_told_what_this_command_takes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        texts(tmp_path / "in" / f"{name}.jsonl", prose(ord(name)))
    refused(r"no file for the split 'train'; it has a.jsonl, b.jsonl; or name the files, as .*in/\*.jsonl$",
            str(tmp_path / "in"), "--output", str(tmp_path / "out"))  # fmt: skip


def test_the_first_row_may_be_one_that_is_dropped(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    good = texts(tmp_path / "good.jsonl", prose(0))
    source.write_text('{"prompt": 1}\n{"text": \n' + Path(good).read_text())
    assert cleaned(tmp_path / "out", str(source), "--bad-rows", "drop") == [{"text": prose(0)}]
    refused("a.jsonl, line 1: no column 'text'", str(source), "--output", str(tmp_path / "no"))
    source.write_text('{"prompt": 1}\n{"text": \n')
    refused("a.jsonl, line 1: prompt must be", str(source), "--output", str(tmp_path / "no"), "--bad-rows", "drop")


def test_what_data_is_held_against_is_named_by_its_line(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", prose(0))
    held = texts(tmp_path / "b.jsonl", prose(1), "half \ud83d")
    refused("b.jsonl, line 2: text holds half", source, "--against", held, "--output", str(tmp_path / "out"))
