"""Every field inherited from transformers and TRL has a fate, and every field of our own is read somewhere."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from align_kit import registry
from align_kit.config import DataFields, DatasetFields, ModelFields, RunFields, inherited, renamed
from align_kit.config.fields import GROUPS
from align_kit.config.schema import default_of, keys_of, namespace, own_keys, resolve

TRAINERS = {
    "pretrain": "trl:SFTConfig",
    "sft": "trl:SFTConfig",
    "dpo": "trl:DPOConfig",
    "kto": "trl:KTOConfig",
    "reward": "trl:RewardConfig",
}
OURS = {row.name: row.config for row in registry.RECIPES if row.name not in TRAINERS}
SOURCES = {
    "TRAINING_ARGUMENTS": ["transformers:TrainingArguments", "trl.trainer.base_config:_BaseConfig"],
    "TRL_TRAINERS": list(TRAINERS.values()),
    "MODEL_CONFIG": ["trl:ModelConfig"],
    "DATA_CONFIG": ["trl:ScriptArguments", "trl.scripts.utils:DatasetMixtureConfig"],
}
PACKAGE = Path(__file__).resolve().parent.parent / "align_kit"


def names(dotted: str) -> set[str]:
    """Return the field names of a class named by a dotted string."""
    return {field.name for field in dataclasses.fields(resolve(dotted))}


@pytest.mark.parametrize("part", SOURCES)
def test_every_inherited_field_has_a_row_and_every_row_a_field(part: str) -> None:
    fields = {name for dotted in SOURCES[part] for name in names(dotted)}
    if part == "TRL_TRAINERS":
        fields -= names("transformers:TrainingArguments")
    assert set(getattr(inherited, part)) == fields


def test_no_field_has_two_rows() -> None:
    assert len(inherited.TABLE) == sum(len(getattr(inherited, part)) for part in SOURCES)


@pytest.mark.parametrize("name", inherited.TRL_TRAINERS)
def test_a_row_names_the_phases_that_have_the_field(name: str) -> None:
    assert inherited.TABLE[name].phases == tuple(
        phase for phase, dotted in {**TRAINERS, **OURS}.items() if name in names(dotted)
    )


def test_our_copies_of_trl_fields_have_trl_defaults() -> None:
    for ours, theirs in ((ModelFields, "trl:ModelConfig"), (DataFields, "trl:ScriptArguments")):
        mine = {field.name: default_of(field) for field in dataclasses.fields(ours)}
        for field in dataclasses.fields(resolve(theirs)):
            assert mine[field.name] == default_of(field), field.name


def test_an_entry_has_the_keys_of_trl_and_those_the_loader_reads() -> None:
    from align_kit.data.load import SPEC_KEYS

    ours = {field.name for field in dataclasses.fields(DatasetFields)}
    assert names("trl.scripts.utils:DatasetConfig") <= ours
    assert ours == set(SPEC_KEYS)


def test_no_key_stands_in_two_groups() -> None:
    assert len(own_keys()) == sum(len(keys_of(cls, group)) for group, cls in GROUPS.items())


@pytest.mark.parametrize("phase", TRAINERS)
def test_no_old_name_is_a_key(phase: str) -> None:
    assert not set(renamed.INSTEAD) & set(namespace(TRAINERS[phase]))


def test_what_to_write_instead_exists() -> None:
    known = {name for dotted in TRAINERS.values() for name in namespace(dotted)}
    known |= set(keys_of(DatasetFields, "entry"))
    plain_words = {"drop", "removed", "set", "write", "upload", "a", "an"}
    replacements = list(renamed.INSTEAD.values())
    replacements += [row.instead for row in inherited.TABLE.values() if row.fate == "refused"]
    first_words = {re.split(r"[^A-Za-z_0-9]", text)[0] for text in replacements}
    assert first_words - plain_words <= known
    assert all(row.instead for row in inherited.TABLE.values() if row.fate == "refused" or row.only)


# Where a name would be found without being used: the tables themselves.
TABLES = {"fields.py", "inherited.py", "renamed.py", "check.py"}


def read_words() -> set[str]:
    """Return every attribute and every string in the package's code, the tables of the configuration excepted."""
    words: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "config" and path.name in TABLES:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
    return words


def test_every_field_is_read() -> None:
    """A field is read or it is deleted: ours, and each inherited one that the table says align_kit reads."""
    fields = {field.name for cls in (ModelFields, DataFields, RunFields) for field in dataclasses.fields(cls)}
    ours = {name for name in fields if name not in inherited.TABLE}
    here = set(registry.names())  # a field that only phases still to come have needs no reader yet
    honoured = {
        name
        for name, row in inherited.TABLE.items()
        if row.fate == "honoured" and row.note == inherited.US and (not row.phases or here & set(row.phases))
    }
    unread = sorted((ours | honoured) - read_words())
    assert unread == []


def test_every_field_of_our_own_classes_is_read() -> None:
    inherited_names = names("transformers:TrainingArguments")
    fields = {name for dotted in OURS.values() for name in names(dotted) - inherited_names}
    assert sorted(fields - read_words()) == []
