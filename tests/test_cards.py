"""Cards: every shipped one is whole and true to its files; every mistake in one is a line that names file and field."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import yaml

from align_kit import cards
from align_kit.errors import UserError
from align_kit.resources import folder
from tests.data_rows import REAL, needs_real_data

NAMES = sorted(file.stem for file in folder("data_cards").glob("*.md"))
NEEDED = {"gsm8k", "gsm8k_solution_pairs", "gsm8k_solution_labels", "llamafactory_dpo_en", "ultrafeedback_binarized",
          "hh-rlhf", "tinyshakespeare", "wikitext-2", "xstest_prompts", "xstest_pairs", "truthfulqa", "self_instruct",
          "llamafactory_c4_demo", "cpython_docs", "sums_text", "sums_sft", "sums_pairs", "sums_labels",
          "sums_prompts", "sums_reason"}  # fmt: skip
GOOD = {
    "pretty_name": "Mine",
    "license": "mit",
    "align_kit": {
        "schema_version": 1,
        "phases": ["sft"],
        "source": {"kind": "file", "path": "mine", "sha256": {"a.jsonl": "0" * 64}},
        "format": "prompt_completion",
        "columns": {"prompt": "q", "completion": "a"},
        "splits": {"train": "a.jsonl"},
        "verified": True,
    },
}


MADE = {"command": ["align-kit", "data", "clean"], "align_kit": "1.0"}


def write_card(tmp_path, change=lambda front: None, name="mine"):
    """Write a good card after `change` has spoilt its front matter."""
    front = yaml.safe_load(yaml.safe_dump(GOOD))
    change(front)
    file = tmp_path / f"{name}.md"
    file.write_text(f"---\n{yaml.safe_dump(front)}---\n\n# Mine\n", encoding="utf-8")
    return file


def test_all_cards_are_shipped():
    assert set(NAMES) >= NEEDED


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_card_is_a_whole_datasheet(name):
    card = cards.load_card(name)
    headings = [line.removeprefix("## ") for line in card.body.splitlines() if line.startswith("## ")]
    assert tuple(headings) == cards.HEADINGS
    front = yaml.safe_load(card.file.read_text(encoding="utf-8").split("---")[1])
    assert front["language"] and front["size_categories"] and front["task_categories"]
    assert card.licences and (card.block.source.kind == "hub" or card.block.verified)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_one_to_hugging_face(name):
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(cards.load_card(name).file)
    assert card.data.pretty_name == cards.load_card(name).pretty_name
    assert card.data.to_dict()["align_kit"]["schema_version"] == cards.SCHEMA_VERSION


@needs_real_data
@pytest.mark.parametrize("name", NAMES)
def test_a_cards_digests_are_its_files(name):
    card = cards.load_card(name)
    for split in card.block.files():
        assert cards.local_file(card, split, REAL) is not None
    if card.block.files():
        assert set(card.block.source.sha256) == set(card.block.files().values())


def test_builtin_cards_name_builtin_sets():
    embedded = pytest.importorskip("align_kit.data.embedded")
    if not hasattr(embedded, "names"):
        pytest.skip("the embedded data is not there")
    paths = {cards.load_card(name).block.source.path for name in NAMES
             if cards.load_card(name).block.source.kind == "builtin"}  # fmt: skip
    assert paths <= set(embedded.names())


def test_an_unknown_card_is_met_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown card 'gsmk8'.*did you mean 'gsm8k'"):
        cards.load_card("gsmk8")


def test_a_card_in_the_working_folder_comes_first(tmp_path, monkeypatch):
    (tmp_path / "data_cards").mkdir()
    write_card(tmp_path / "data_cards", name="gsm8k")
    monkeypatch.chdir(tmp_path)
    assert cards.load_card("gsm8k").pretty_name == "Mine"
    assert cards.load_card(tmp_path / "data_cards" / "gsm8k.md").pretty_name == "Mine"
    assert "hh-rlhf" in cards.card_names()


MISTAKES = [
    (lambda front: front.pop("license"), "field license: missing"),
    (lambda front: front.update(license=""), "field license: missing"),
    (lambda front: front.pop("pretty_name"), "field pretty_name: missing"),
    (lambda front: front.pop("align_kit"), "field align_kit: missing"),
    (lambda front: front["align_kit"].update(wieght=1), "unknown field 'wieght'.*did you mean 'weight'"),
    (lambda front: front["align_kit"]["source"].update(rev="x"), "align_kit.source.rev: unknown field 'rev'"),
    (lambda front: front["align_kit"].update(schema_version=2), r"align_kit.schema_version: .* \(got 2\)"),
    (lambda front: front["align_kit"].update(format="parquet"), r"align_kit.format: .*\(got 'parquet'\)"),
    (lambda front: front["align_kit"].update(phases=["dpo"]), "phase 'dpo' cannot use format 'prompt_completion'"),
    (lambda front: front["align_kit"].update(weight=0), "align_kit.weight"),
    (lambda front: front["align_kit"].update(prompt_template="x"), "must be 'chat' or a text that holds {prompt}"),
    (lambda front: front["align_kit"]["source"].update(sha256={"a.jsonl": "12"}), "64 lower-case hexadecimal"),
    (lambda front: front["align_kit"]["source"].update(sha256={}), "lacks the digest of 'a.jsonl'"),
    (lambda front: front["align_kit"].pop("splits"), "align_kit.splits: Field required"),
    (lambda front: front["align_kit"].update(checker="no colon"), "align_kit.checker"),
    (lambda front: front["align_kit"].update(stats={"rows": 3}), "stats.rows must be a mapping of the card's splits"),
    (lambda front: front["align_kit"].update(stats={"rows": {"tset": 3}}), "stats.rows must be a mapping"),
    (lambda front: front["align_kit"].update(stats={"kept": "many"}), "kept must be a number, or a mapping of splits"),
    (lambda front: front["align_kit"].update(filters=[{"nmae": "x", "dropped": 1}]), "unknown field 'nmae'.*'name'"),
    (lambda front: front["align_kit"].update(filters=[{"name": "x", "dropped": -1}]), "filters.0.dropped.*got -1"),
    (lambda front: front["align_kit"].update(decontamination=[{"against": "a", "n": 0, "dropped": 0}]),
     "decontamination.0.n"),
    (lambda front: front["align_kit"].update(pii={"email": -1}), "pii.email"),
    (lambda front: front["align_kit"].update(made={"command": ["x"]}), "made.align_kit: Field required"),
    (lambda front: front["align_kit"].update(made={**MADE, "from": [{"split": "train"}]}),
     "name either a card or a file"),
    (lambda front: front["align_kit"].update(made={**MADE, "from": [{"card": "a", "digest": "short"}]}),
     "made.from.0.digest"),
    (lambda front: front["align_kit"].update(made={**MADE, "prompts": [1, 2]}), "prompts must be one number, text"),
]


@pytest.mark.parametrize("change, said", MISTAKES, ids=[said[:40] for _, said in MISTAKES])
def test_a_mistake_names_file_and_field(tmp_path, change, said):
    file = write_card(tmp_path, change)
    with pytest.raises(UserError, match=said) as caught:
        cards.read_card(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_front_matter_names_the_line(tmp_path):
    file = tmp_path / "bad.md"
    file.write_text("---\npretty_name: x\nlicense: [mit\n---\n")
    with pytest.raises(UserError, match=r"bad.md, line \d: not YAML"):
        cards.read_card(file)
    file.write_text("# no front matter\n")
    with pytest.raises(UserError, match="no front matter"):
        cards.read_card(file)
    with pytest.raises(UserError, match="cannot read the card"):
        cards.read_card(tmp_path / "absent.md")


@pytest.mark.parametrize("licence, said", [
    ("unknown", "is unknown"), ("other", "is unknown"), ("cc-by-nc-4.0", "forbids commercial use"),
    ("cc-by-nc-sa-4.0", "forbids commercial use"), ("mit", ""), (["mit", "cc-by-nc-2.0"], "forbids commercial use"),
])  # fmt: skip
def test_licence_warnings(tmp_path, licence, said):
    card = cards.read_card(write_card(tmp_path, lambda front: front.update(license=licence)))
    assert (said in " ".join(card.warnings())) if said else card.warnings() == []


def test_an_unverified_card_says_so():
    assert any("not verified" in text for text in cards.load_card("hh-rlhf").warnings())


def test_a_changed_file_is_an_error(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jsonl").write_text("{}\n")
    card = cards.read_card(write_card(tmp_path))
    with pytest.raises(UserError, match="sha256 is .*the card .*mine.md says 0000000000000000"):
        cards.local_file(card, "train", None)


@needs_real_data
def test_one_flipped_byte_is_found(tmp_path):
    shutil.copytree(REAL / "xstest", tmp_path / "xstest")
    file = tmp_path / "xstest" / "preference_pairs.jsonl"
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match="sha256"):
        cards.local_file(cards.load_card("xstest_pairs"), "train", tmp_path)


def test_a_card_says_how_its_rows_were_made(tmp_path):
    source = {"card": "gsm8k", "split": "train", "digest": "a" * 32, "rows": 9, "share": 0.5}
    record = {
        "stats": {"rows": {"train": 7}, "near_duplicates": 2},
        "filters": [{"name": "words", "rule": "50 to 100,000", "threshold": 50, "dropped": 2}],
        "decontamination": [{"against": "card:gsm8k[test]", "n": 13, "dropped": 0}],
        "pii": {"email": 3},
        "made": {**MADE, "seed": 0, "from": [source], "teacher": "a model"},
    }
    block = cards.read_card(write_card(tmp_path, lambda front: front["align_kit"].update(record))).block
    assert block.model_dump(include=set(record), by_alias=True, exclude_none=True) == record
    assert block.made.sources[0].rows == 9 and block.filters[0].threshold == 50


def test_a_card_beside_its_files_moves_with_them(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    data = b"{}\n"
    (here / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl").write_text("another's\n")
    monkeypatch.chdir(tmp_path)
    digest = hashlib.sha256(data).hexdigest()
    write_card(here, lambda front: front["align_kit"]["source"].update(path=".", sha256={"a.jsonl": digest}))
    here.rename(there)
    card = cards.read_card(there / "mine.md")
    assert cards.local_file(card, "train", tmp_path) == there / "a.jsonl"
    (there / "a.jsonl").unlink()
    assert cards.local_file(card, "train", tmp_path) is None


def test_a_data_home_that_is_no_folder_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGN_KIT_DATA", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="ALIGN_KIT_DATA is .*not a folder"):
        cards.data_home()


@pytest.mark.parametrize("split, rows, bounds", [
    ("train", 10, (0, 10)), ("train[:3]", 10, (0, 3)), ("train[2:]", 10, (2, 10)), ("train[10%:90%]", 10, (1, 9)),
    ("train[-3:]", 10, (7, 10)), ("train[:99]", 10, (0, 10)), ("train[-20%:]", 10, (8, 10)),
])  # fmt: skip
def test_slices(split, rows, bounds):
    assert cards.slice_bounds(split, rows) == bounds


@pytest.mark.parametrize("split", ["train[:x]", "train[1]", "[1:2]", "train[:5"])
def test_a_broken_slice_is_refused(split):
    with pytest.raises(UserError, match="cannot read"):
        cards.slice_bounds(split, 10)


def test_alternatives_are_built_in():
    for phase in ("pretrain", "sft", "dpo", "reward", "kto", "orpo", "ppo"):
        names = cards.alternatives(phase)
        assert names and all(cards.load_card(name).block.source.kind == "builtin" for name in names)
    assert cards.alternatives("sft")[:1] == ["sums_sft"], "its own set before a view of another card's"


def test_one_checker_serves_the_embedded_and_the_real_problems() -> None:
    embedded, real = (cards.checker(cards.load_card(name)) for name in ("sums_prompts", "gsm8k"))
    assert embedded is real
    assert real("2 and 3?\n", "2+3=5\n#### 5", "#### 5").exact


def test_a_card_without_a_checker_says_so() -> None:
    with pytest.raises(UserError, match="card tinyshakespeare names no checker"):
        cards.checker(cards.load_card("tinyshakespeare"))
