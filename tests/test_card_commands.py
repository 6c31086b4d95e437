"""`align-kit cards`: cards are held to their files, mended without a scratch, and handed on as others read them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from align_kit import cards
from align_kit.card_commands import COMMANDS
from align_kit.card_commands.check import check
from align_kit.card_commands.croissant import CONFORMS_TO, REQUIRED, croissant
from align_kit.card_commands.edit import put
from align_kit.card_commands.rows import counted
from align_kit.card_commands.table import BEGIN, END, table
from align_kit.card_commands.update import updated
from align_kit.cards.licences import address, is_known, on_the_hub
from align_kit.cli import main
from align_kit.data.load import load
from align_kit.data.made import MadeSet, write_made
from tests.harness import ROOT

NAMES = sorted(file.stem for file in (ROOT / "data_cards").glob("*.md"))
ROWS = [{"prompt": f"{n} + 1?", "completion": f"{n + 1}"} for n in range(5)]
CHARACTERS = sum(len(text) for row in ROWS for text in row.values())
MADE = {"command": ["align-kit", "data", "clean", "x.jsonl"]}


@pytest.fixture(autouse=True)
def no_data_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked for where a test says."""
    monkeypatch.delenv("ALIGN_KIT_DATA", raising=False)


@pytest.fixture
def card(tmp_path: Path) -> Path:
    """The card of a set of five rows, as a command writes it."""
    made = MadeSet("tidy", "Tidy", ("mit",), ("sft",), "prompt_completion", made=MADE)
    return write_made(tmp_path / "set", made, {"train": ROWS, "test": ROWS[:2]})


def edited(card: Path, old: str, new: str) -> None:
    """Replace `old` in a card, where it stands once."""
    text = card.read_text()
    assert text.count(old) == 1, (old, text)
    card.write_text(text.replace(old, new))


# --- check --------------------------------------------------------------------------------------------------


def test_the_cards_that_come_along_are_true(real_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("ALIGN_KIT_DATA", str(real_data))
    assert main(["cards", "check"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES and f"{len(NAMES)} cards, 0 wrong" in last
    unseen = {line.split()[0] for line in lines if "digest not checked" in line}
    assert unseen == {"hh-rlhf", "ultrafeedback_binarized", "wikitext-2"}
    assert not any("no stats yet" in line for line in lines)


def test_counts_are_those_of_a_run(real_data: Path) -> None:
    for name in ("llamafactory_dpo_en", "self_instruct", "tinyshakespeare", "sums_prompts"):
        found = cards.load_card(name)
        for split in found.block.splits:
            loaded = load([{"path": f"card:{name}", "split": split}], phase="eval", data_home=real_data)
            assert counted(found, split, real_data).rows == len(loaded.dataset)


def test_a_made_set_is_checked_by_its_file(card: Path, capsys: Any) -> None:
    assert main(["cards", "check", str(card)]) == 0
    assert "ok: 5 train, 2 test rows" in capsys.readouterr().out


def test_without_files_the_rest_is_checked_and_said(card: Path, capsys: Any) -> None:
    card.with_name("test.jsonl").unlink()
    assert main(["cards", "check", str(card)]) == 0
    out = capsys.readouterr().out
    assert "5 train rows; the files of test are not here: digest not checked" in out and "ALIGN_KIT_DATA" in out
    card.with_name("train.jsonl").unlink()
    edited(card, "license: mit", "license: mti")
    assert main(["cards", "check", str(card)]) == 2
    assert "licence 'mti'" in capsys.readouterr().out


def _flip(card: Path) -> None:
    file = card.with_name("train.jsonl")
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(bytes(data))


LIES: list[tuple[Callable[[Path], Any], str]] = [
    (_flip, "sha256 is .*restore the file"),
    (lambda card: edited(card, "      train: 5\n", "      train: 6\n"), "stats say 6 rows in train, its file has 5"),
    (lambda card: edited(card, f"      train: {CHARACTERS}\n", "      train: 1\n"),
     f"stats say 1 characters in train, its file has {CHARACTERS}"),
    (lambda card: edited(card, "license: mit", "license: mti"), "licence 'mti' is not on SPDX's list or the hub's"),
    (lambda card: edited(card, "## Uses\n", "## Usage\n"), "says nothing under Uses"),
    (lambda card: edited(card, "Made for sft. What its sources must not be used for holds here too.", ""),
     "says nothing under Uses"),
    (lambda card: edited(card, "  verified: true", "  verified: true\n  checker: align_kit.data.checkers:chekc"),
     "checker align_kit.data.checkers:chekc cannot be imported"),
    (lambda card: edited(card, "  splits:", "  columns: {completion: anwser}\n  splits:"), "row 1: .*anwser"),
    (lambda card: edited(card, "format: prompt_completion", "format: text"), "row 1: .*text"),
    (lambda card: edited(card, "- n<1K", "- 1K<n<10K"), "size_categories is 1K<n<10K, its rows make n<1K"),
    (lambda card: edited(card, "kind: file\n", "kind: disk\n"), "align_kit.source.kind"),
    (lambda card: card.write_text("no front matter"), "no front matter"),
    (lambda card: card.unlink(), "cannot read the card"),
]  # fmt: skip


@pytest.mark.parametrize("spoil, said", LIES, ids=[said[:40] for _, said in LIES])
def test_a_lie_is_found(card: Path, spoil: Callable[[Path], Any], said: str, capsys: Any) -> None:
    spoil(card)
    assert main(["cards", "check", str(card), "gsm8k"]) == 2
    first, second, last = capsys.readouterr().out.splitlines()
    assert re.search(rf"wrong: .*{said}", first) and " ok" in second and last.startswith("2 cards, 1 wrong")


def test_a_licence_of_its_own_is_one_that_can_be_read(card: Path) -> None:
    edited(card, "license: mit", "license: other\nlicense_name: ours-1.0")
    assert "ours-1.0" in check(str(card), None).sentence()
    edited(card, "license_name: ours-1.0", "license_name: ours-1.0\nlicense_link: LICENCE.txt")
    assert not check(str(card), None).wrong


def test_verified_needs_a_digest(tmp_path: Path) -> None:
    file = tmp_path / "hh-rlhf.md"
    file.write_text((ROOT / "data_cards" / "hh-rlhf.md").read_text().replace("verified: false", "verified: true"))
    assert check(str(file), None).wrong == ["verified: true, but there is no digest for train, test"]


def test_an_unknown_card_is_a_line_and_the_others_go_on(capsys: Any) -> None:
    assert main(["cards", "check", "gsmk8", "sums_pairs"]) == 2
    out = capsys.readouterr().out
    assert "did you mean 'gsm8k'" in out and "4,096 train" in out


def test_rows_of_the_running_python_are_not_counted() -> None:
    found = check("cpython_docs", None)
    assert not found.wrong and not found.rows and "not counted" in found.sentence()


@pytest.mark.parametrize("licence, known, hub, text", [
    ("mit", True, True, "MIT.html"), ("CC-BY-4.0", True, True, "CC-BY-4.0.html"), ("odc-by", True, True, "ODC-By-1.0"),
    ("psf-2.0", True, False, "PSF-2.0.html"), ("gemma", True, True, None), ("unknown", True, True, None),
    ("ours", False, False, None),
])  # fmt: skip
def test_licences_are_known_by_their_lists(licence: str, known: bool, hub: bool, text: str | None) -> None:
    assert (is_known(licence), on_the_hub(licence)) == (known, hub)
    found = address(licence)
    assert found is None if text is None else found is not None and text in found


# --- update -------------------------------------------------------------------------------------------------

COMMENTED = """---
# what this is
pretty_name: Mine   # in words
license: mit
align_kit:
  schema_version: 1
  # two phases
  phases: [sft,   eval]
  source: {kind: file, path: .}  # beside this card
  format: prompt_completion
  splits:
    train: 'rows.jsonl'   # all of them

  verified: true
# the end
---

# Mine
verified: true stays here

"""
ASKED = '{"question": "2 + 2?", "answer": "4"}\n'


def written(tmp_path: Path, text: str = COMMENTED, rows: str = ASKED) -> Path:
    """Write a card by hand and its file beside it."""
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "mine.md").write_bytes(text.encode())
    return tmp_path / "mine.md"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_update_completes_a_card_and_keeps_every_byte_of_it(tmp_path: Path, newline: str, capsys: Any) -> None:
    before = COMMENTED.replace("\n", newline)
    file = written(tmp_path, before)
    assert main(["cards", "update", str(file)]) == 0
    shown = capsys.readouterr().out
    after = file.read_bytes().decode()
    block = cards.read_card(file).block
    assert block.columns == {"prompt": "question", "completion": "answer"}
    assert block.stats == {"rows": {"train": 1}, "characters": {"train": 7}} and len(block.source.sha256) == 1
    # What was there is there, in its order: only whole lines and the inside of {} were added.
    kept = re.sub(r", sha256: \{.*?\}", "", after)
    added = [line for line in kept.split(newline) if line not in before.split(newline)]
    assert [line for line in kept.split(newline) if line not in added] == before.split(newline)
    assert len(added) == 4 and all(f"+{line}" in shown.replace("\r", "") for line in added)
    assert "written to" in shown and check(str(file), None).rows == {"train": 1}
    assert main(["cards", "update", str(file)]) == 0
    assert "nothing to change" in capsys.readouterr().out and file.read_bytes().decode() == after


def test_a_dry_run_shows_and_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    file = written(tmp_path)
    assert main(["cards", "update", "--dry-run", str(file)]) == 0
    assert "+    rows: {train: 1}" in capsys.readouterr().out
    assert file.read_text() == COMMENTED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.md", "rows.jsonl"]


def test_a_card_that_cannot_be_replaced_is_as_it_was(tmp_path: Path, capsys: Any) -> None:
    file = written(tmp_path)
    (tmp_path / ".mine.md.draft").mkdir()  # where the new text would be written first
    assert main(["cards", "update", str(file)]) == 2
    assert "cannot write" in capsys.readouterr().err and file.read_text() == COMMENTED


def test_a_change_that_was_meant_is_taken_in(card: Path) -> None:
    with card.with_name("train.jsonl").open("a") as stream:
        stream.write(json.dumps(ROWS[0]) + "\n")
    before = card.read_text()
    assert check(str(card), None).wrong
    assert main(["cards", "update", str(card)]) == 0
    assert check(str(card), None).wrong == [] and cards.read_card(card).block.stats["rows"] == {"train": 6, "test": 2}
    pairs = zip(before.splitlines(), card.read_text().splitlines(), strict=True)
    assert sum(old != new for old, new in pairs) == 3  # a digest, rows, characters


@pytest.mark.parametrize("name", ["gsm8k", "self_instruct", "tinyshakespeare", "sums_pairs", "hh-rlhf", "cpython_docs"])
def test_the_stats_that_come_along_are_what_update_writes(name: str, real_data: Path) -> None:
    file = ROOT / "data_cards" / f"{name}.md"
    text = file.read_text()
    without = re.sub(r"  stats:\n(    .*\n)+", "", text)
    assert ("stats" in text) == bool(cards.load_card(file).block.stats)
    assert updated(without, file, real_data)[0] == text


def test_what_cannot_be_computed_is_said(tmp_path: Path, capsys: Any) -> None:
    assert main(["cards", "update", "hh-rlhf", "cpython_docs"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "its files are not here" in first and "the Python that runs" in second
    file = written(tmp_path)
    edited(file, "'rows.jsonl'", "'rows.jsonl'\n    test: gone.jsonl")
    assert main(["cards", "update", str(file)]) == 2
    assert "lacks the digest of 'gone.jsonl', whose file is not here" in capsys.readouterr().err
    file = written(tmp_path, rows='{"question": 3, "answer": "4"}\n')
    assert main(["cards", "update", str(file)]) == 2
    assert "row 1" in capsys.readouterr().err and file.read_text() == COMMENTED


KEY = st.text("ab1.: ", min_size=1, max_size=4)
VALUE = st.integers(0, 10**6) | st.text("0123456789abcdef: #'\"", min_size=1, max_size=12)


@settings(max_examples=40)
@given(st.dictionaries(KEY, VALUE, max_size=4), st.dictionaries(KEY, VALUE, min_size=1, max_size=3), st.booleans())
def test_an_edit_changes_what_it_names_and_nothing_else(there: Any, new: Any, flow: bool) -> None:
    whole = {"top": {"first": 1, "place": there, "last": [1, 2]}}
    dumped = yaml.safe_dump(whole, default_flow_style=flow, sort_keys=False)
    text = f"---\n# before\n{dumped}# after\n---\n# body: 1\n"
    front, _ = cards.front_matter(put(text, ("top", "place"), new), Path("x.md"))
    assert front == {"top": {"first": 1, "place": {**there, **new}, "last": [1, 2]}}
    assert put(text, ("top", "place"), there) == text
    result = put(text, ("top", "new", "inner"), new)
    front, _ = cards.front_matter(result, Path("x.md"))
    assert front == {"top": {"first": 1, "place": there, "last": [1, 2], "new": {"inner": new}}}
    rest = iter(result)
    assert all(letter in rest for letter in text)  # what was there is there, in its order


# --- croissant ----------------------------------------------------------------------------------------------


def _ids(node: Any) -> list[str]:
    if isinstance(node, list):
        return [found for item in node for found in _ids(item)]
    if not isinstance(node, dict):
        return []
    own = [node["@id"]] if "@type" in node and "@id" in node else []
    return own + [found for name, item in node.items() if name != "@context" for found in _ids(item)]


def _leaves(field: dict[str, Any]) -> list[dict[str, Any]]:
    return [leaf for part in field["subField"] for leaf in _leaves(part)] if "subField" in field else [field]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_what_croissant_requires(name: str, real_data: Path) -> None:
    card = cards.load_card(name)
    made = json.loads(json.dumps(croissant(card, real_data)))
    assert made["@type"] == "sc:Dataset" and made["conformsTo"] == CONFORMS_TO
    assert made["@context"]["conformsTo"] == "dct:conformsTo" and made["@context"]["@vocab"] == "https://schema.org/"
    lacking = {name for name in REQUIRED if not made.get(name)} - {"creator", "datePublished"}
    files, builtin = card.block.files(), card.block.source.kind == "builtin"
    assert lacking == ({"url"} if builtin else set()) | (set() if files else {"distribution"})
    assert len(made["license"]) == len(card.licences) and made.get("citeAs") == card.front.get("citation")
    assert {file["@id"]: file["sha256"] for file in made["distribution"]} == card.block.source.sha256
    assert [records["@id"] for records in made["recordSet"]] == list(files)
    names = _ids(made)
    assert len(names) == len(set(names))
    for records in made["recordSet"]:
        leaves = [leaf for field in records["field"] for leaf in _leaves(field)]
        assert leaves and all(leaf["dataType"].startswith("sc:") for leaf in leaves)
        assert {leaf["source"]["fileObject"]["@id"] for leaf in leaves} == {files[records["@id"]]}


def test_fields_have_the_types_of_their_values(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}], "n": 1, "share": 0.5, "seen": True, "note": None}
    made = MadeSet("chat", "Chat", ("mit",), ("sft",), "messages", made=MADE)
    card = cards.read_card(write_made(tmp_path / "set", made, {"train": [row, {**row, "note": "late"}]}))
    fields = {field["name"]: field for field in croissant(card, None)["recordSet"][0]["field"]}
    assert [fields[name]["dataType"] for name in ("n", "share", "seen", "note")] == [
        "sc:Integer", "sc:Float", "sc:Boolean", "sc:Text"]  # fmt: skip
    assert fields["messages"]["repeated"] and [part["name"] for part in fields["messages"]["subField"]] == [
        "role", "content"]  # fmt: skip
    assert fields["messages"]["subField"][1]["source"] == {
        "fileObject": {"@id": "train.jsonl"}, "extract": {"column": "messages"},
        "transform": {"jsonPath": "content"}}  # fmt: skip


def test_the_command_writes_a_file_and_names_what_is_lacking(card: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["cards", "croissant", str(card), "--output", str(tmp_path / "set" / "c.json")]) == 0
    said = capsys.readouterr()
    assert "url, creator, datePublished, which the card does not know" in said.err
    made = json.loads((tmp_path / "set" / "c.json").read_text())
    assert [file["contentUrl"] for file in made["distribution"]] == ["train.jsonl", "test.jsonl"]
    assert main(["cards", "croissant", str(card)]) == 0
    assert json.loads(capsys.readouterr().out) == made
    assert main(["cards", "croissant", str(card), "--output", str(tmp_path / "gone" / "c.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_the_reference_reader_reads_the_same_rows(tmp_path: Path, real_data: Path) -> None:
    """MLCommons' own library takes every card without an error, and finds the rows that the cards count."""
    mlcroissant = pytest.importorskip("mlcroissant")
    for folder in real_data.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    for name in NAMES:
        card = cards.load_card(name)
        file = tmp_path / f"{name}.json"
        home = real_data / card.block.source.path if card.block.source.kind == "file" else real_data
        assert home.exists() or card.block.source.kind != "file"
        file.write_text(json.dumps(croissant(card, real_data)))
        found = mlcroissant.Dataset(jsonld=str(file))  # raises where the specification is broken
        for split, named in card.block.files().items():
            if card.block.stats["rows"][split] > 1:  # a text is one record, whatever slice of it the split is
                records = list(found.records(record_set=split))
                assert len(records) == card.block.stats["rows"][split], (name, named)


# --- table and command line ---------------------------------------------------------------------------------


def test_the_readme_holds_the_table_of_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    between = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert between == table(), "run `align-kit cards table --write README.md`"
    assert [line.split("`")[1] for line in between.splitlines()[2:]] == NAMES


def test_writing_the_table_keeps_the_rest(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "PAGE.md"
    file.write_bytes(f"# Mine\r\n\n{BEGIN}\nold\n{END}\nend \n".encode())
    assert main(["cards", "table", "--write", str(file)]) == 0
    text = file.read_bytes().decode()
    assert text == f"# Mine\r\n\n{BEGIN}\n\n{table()}\n\n{END}\nend \n" and "written" in capsys.readouterr().out
    assert main(["cards", "table", "--write", str(file)]) == 0
    assert "nothing to change" in capsys.readouterr().out and file.read_bytes().decode() == text
    file.write_text("# No place\n")
    assert main(["cards", "table", "--write", str(file)]) == 2
    assert "put these two lines where it belongs" in capsys.readouterr().err and file.read_text() == "# No place\n"


def test_the_list_is_a_line_for_each_card(capsys: Any) -> None:
    assert main(["cards"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES and "GSM8K" in lines[NAMES.index("gsm8k")]


@pytest.mark.parametrize("words, said", [
    (["chekc"], "unknown command of align-kit cards 'chekc'.*did you mean 'check'"),
    (["check", "--all"], "align-kit cards check: unrecognized arguments: --all"),
    (["croissant"], "the following arguments are required: name"),
    (["croissant", "gsmk8"], "did you mean 'gsm8k'"),
    (["update", "nowhere.md"], "cannot read nowhere.md"),
    (["table", "--write", "nowhere.md"], "cannot read nowhere.md"),
])  # fmt: skip
def test_a_mistake_is_one_line(words: list[str], said: str, capsys: Any) -> None:
    assert main(["cards", *words]) == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and err.count("\n") == 1


def test_help_names_every_command(capsys: Any) -> None:
    assert main(["cards", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"align-kit cards {name}" in told for name in COMMANDS)
