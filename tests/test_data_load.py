"""Loading: shapes recognised and converted, files and cards read, mixtures exact, mistakes one line each."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_kit.data import shapes
from align_kit.data.digest import rows_digest
from align_kit.data.load import load, mix, to_dataset, train_test
from align_kit.data.read import quiet, read_hub
from align_kit.data.shapes import Shape
from align_kit.errors import UserError
from tests.data_rows import REAL, ROOT, assistant, needs_real_data, user

QA = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}."} for n in range(10)]


def jsonl(path, rows):
    """Write rows as JSON lines and return the path as a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def converted(row, **shape):
    """Return the kind and the canonical form of one row."""
    known = Shape(**shape) if shape else shapes.recognise(row)
    kind, (canonical,) = shapes.convert([row], known, "here")
    return kind, canonical


TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
CHAT = [user("hi"), assistant("hello")]
SHAPES = [
    ({"text": "x"}, "text", {"text": "x"}),
    ({"prompt": "p", "answer": "a"}, "prompt", {"prompt": "p", "answer": "a"}),
    ({"prompt": "p", "completion": "c"}, "prompt_completion", {"prompt": "p", "completion": "c"}),
    ({"question": "q", "answer": "a"}, "prompt_completion", {"prompt": "q", "completion": "a"}),
    ({"instruction": "i", "input": "x", "output": "o"}, "prompt_completion", {"prompt": "i\nx", "completion": "o"}),
    ({"instruction": "i", "input": "", "output": "o"}, "prompt_completion", {"prompt": "i", "completion": "o"}),
    ({"instruction": "i", "output": "o", "system": "s", "history": [["a", "b"]]}, "prompt_completion",
     {"prompt": [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("i")],
      "completion": [assistant("o")]}),
    ({"instruction": "i", "chosen": "c", "rejected": "r"}, "preference",
     {"prompt": "i", "chosen": "c", "rejected": "r"}),
    ({"messages": CHAT}, "messages", {"messages": CHAT}),
    ({"conversations": TURNS}, "messages", {"messages": CHAT}),
    ({"conversations": TURNS, "system": "s"}, "messages", {"messages": [{"role": "system", "content": "s"}, *CHAT]}),
    ({"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "no"}}, "preference",
     {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [assistant("no")]}),
    ({"prompt": "p", "completion": "c", "label": 1}, "binary", {"prompt": "p", "completion": "c", "label": True}),
    ({"prompt": "p", "completion": "c", "label": "False"}, "binary",
     {"prompt": "p", "completion": "c", "label": False}),
    ({"prompt": "hi", "chosen": CHAT, "rejected": [CHAT[0], assistant("no")]}, "preference",
     {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [assistant("no")]}),
    ({"chosen": CHAT, "rejected": CHAT}, "preference",
     {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}),
    ({"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: help"}, "preference",
     {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " hello", "rejected": " help"}),
    ({"prompt": "p", "chosen": [assistant("c")], "rejected": [assistant("r")]}, "preference",
     {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]}),
    ({"conversations": [*TURNS[:1], {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                        {"from": "observation", "value": "7"}, TURNS[1]], "tools": '[{"name": "f"}]'}, "messages",
     {"messages": [user("hi"), {"role": "assistant", "content": "", "tool_calls": [
         {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
         {"role": "tool", "content": "7"}, assistant("hello")], "tools": [{"name": "f"}]}),
]  # fmt: skip


@pytest.mark.parametrize("row, kind, canonical", SHAPES, ids=[f"{place}-{kind}" for place, (_, kind, _) in
                                                              enumerate(SHAPES)])  # fmt: skip
def test_shapes_are_recognised_and_converted(row, kind, canonical):
    assert converted(row) == (kind, canonical)
    assert to_dataset(kind, [canonical]).to_list() == [canonical]


def test_columns_are_named_and_reached_into():
    row = {"Best Answer": "a", "x": {"deep": [{"q": "question"}]}}
    shape = {"format": "prompt_completion", "columns": {"prompt": "x.deep.0.q", "completion": "Best Answer"}}
    assert converted(row, **shape)[1] == {"prompt": "question", "completion": "a"}


def test_a_row_is_named_by_the_line_it_stands_in(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "c"}\n \n\n{"text": 4}\n')
    (tmp_path / "c.json").write_text('[{"text": "d"}, {"text": 5}]')
    for files, split, place in (
        (["a.jsonl", "b.jsonl"], "train", "b.jsonl, line 4"),
        ("b.jsonl", "train[1:]", "b.jsonl, line 4"),
        (["a.jsonl", "c.json"], "train[1:]", "c.json, row 2"),
    ):
        with pytest.raises(UserError, match=f"{place}: text must be a string, got [45]"):
            load([{"path": str(tmp_path), "data_files": files, "split": split}], phase="pretrain")


def test_content_of_text_parts_is_the_text_they_make_together():
    parts = [{"type": "text", "text": "2 + 2"}, {"type": "text", "text": "?"}]
    row = {"messages": [{"role": "user", "content": parts}, assistant("4 \U0001f600")]}
    assert converted(row)[1] == {"messages": [user("2 + 2?"), assistant("4 \U0001f600")]}
    seen = {"messages": [{"role": "user", "content": [*parts, {"type": "image"}]}, assistant("4")]}
    assert converted(seen)[1] == seen  # a template that knows parts says what becomes of them


def test_prompt_templates():
    row = {"prompt": "p {x}", "completion": "c"}
    plain = converted(row, format="prompt_completion", prompt_template="Q: {prompt}\nA: ")[1]
    assert plain == {"prompt": "Q: p {x}\nA: ", "completion": "c"}
    chat = converted(row, format="prompt_completion", prompt_template="chat")[1]
    assert chat == {"prompt": [user("p {x}")], "completion": [assistant("c")]}


BAD_ROWS = [
    ({"a": 1}, {}, "cannot recognise rows with the columns a"),
    ({"promt": "p", "completion": "c"}, {"format": "prompt_completion"}, "no column 'prompt'.*did you mean 'promt'"),
    ({"text": None}, {}, "row 1: text must be a string, got None"),
    ({"messages": []}, {}, "messages must be a string or a list of messages"),
    ({"messages": [{"content": "x"}]}, {}, "has no role"),
    ({"messages": [{"role": "user", "content": None}]}, {}, "user message in messages has no content"),
    ({"prompt": "p", "completion": "c", "label": "maybe"}, {}, "label must be true or false"),
    ({"conversations": [{"from": "function_call", "value": "no"}]}, {}, "not JSON"),
    ({"prompt": "p", "completion": "a \ud800 b"}, {}, r"row 1: completion holds half a character \(\\ud800\)"),
    ({"messages": [user("p"), assistant("\ude00")]}, {}, "row 1: messages holds half a character"),
    ({"prompt": "p", "tools": '[{"name": "\\udc00"}]'}, {}, "row 1: tools holds half a character"),
    ({"prompt": "p", "tools": [{"\udc00": 1}]}, {}, "row 1: tools holds half a character"),
    ({"chosen": [user("a"), assistant("c")], "rejected": [user("b"), assistant("c")]}, {},
     "row 1: chosen and rejected share no first message .* give a prompt column"),
    ({"chosen": [assistant("c")], "rejected": [assistant("d")]}, {}, "row 1: chosen and rejected share no first"),
]


@pytest.mark.parametrize("row, shape, said", BAD_ROWS, ids=[said[:30] for _, _, said in BAD_ROWS])
def test_bad_rows_are_named(row, shape, said):
    with pytest.raises(UserError, match=said):
        converted(row, **shape)


def test_files_of_every_kind_give_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [jsonl(tmp_path / "a.jsonl", QA), str(tmp_path / "a.json"), str(tmp_path / "a.csv")]
    (tmp_path / "a.json").write_text(json.dumps(QA))
    with open(paths[2], "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["question", "answer"])
        writer.writeheader()
        writer.writerows(QA)
    pq.write_table(pa.Table.from_pylist(QA), tmp_path / "a.parquet")
    loaded = [load([{"path": path}], phase="sft") for path in [*paths, str(tmp_path / "a.parquet")]]
    assert {item.digest for item in loaded} == {rows_digest(loaded[0].dataset)}
    assert loaded[0].dataset[3] == {"prompt": "What is 3 + 1?", "completion": "It is 4."}
    assert loaded[0].sources[0].rows == 10 and loaded[0].warnings == []


def test_trls_ways_to_name_files(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", QA)
    jsonl(tmp_path / "test.jsonl", QA[:2])
    for spec, rows in [
        ({"path": "json", "data_files": path}, 10),
        ({"path": "json", "data_files": {"train": path, "test": [str(tmp_path / "test.jsonl")]}, "split": "test"}, 2),
        ({"path": str(tmp_path)}, 10),
        ({"path": str(tmp_path), "split": "test"}, 2),
        ({"path": str(tmp_path.parent), "data_dir": tmp_path.name, "split": "train[:50%]"}, 5),
        ({"path": str(tmp_path), "data_files": "test.jsonl"}, 2),
        ({"path": path, "columns": ["question", "answer"], "max_samples": 4}, 4),
        ({"path": path, "columns": {"prompt": "answer", "completion": "question"}}, 10),
    ]:
        assert len(load([spec], phase="sft").dataset) == rows, spec


def test_a_text_file_is_one_document_and_its_slices_join_again(tmp_path):
    text = "\nFirst.\n\nSecond line,\nthird\u2028line.\n\n\nLast, no newline"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    parts = [load([{"path": str(tmp_path / "a.txt"), "split": f"train[{cut}]"}], phase="pretrain").dataset
             for cut in (":30%", "30%:80%", "80%:")]  # fmt: skip
    assert all(len(part) == 1 for part in parts)
    assert "".join(part[0]["text"] for part in parts) == text


def test_load_is_equal_in_another_process(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", QA)
    other = jsonl(tmp_path / "b.jsonl", QA[:4])
    specs = [{"path": path, "weight": 0.7}, {"path": other, "weight": 0.3}]
    mine = load(specs, phase="sft", seed=3)
    code = f"from align_kit.data.load import load; print(load({specs!r}, phase='sft', seed=3).digest)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == mine.digest and said.stderr == ""
    assert load(specs, phase="sft", seed=4).digest != mine.digest


def test_a_digest_depends_on_values_and_order_alone():
    rows = [{"prompt": "é", "completion": "c", "tools": None}, {"prompt": "q", "completion": "d"}]
    same = [{"completion": "c", "prompt": "é"}, rows[1]]
    assert rows_digest(rows) == rows_digest(same) == rows_digest(to_dataset("prompt_completion", rows))
    assert rows_digest(rows) == "1c1dad97b1b0f6627e2a3efdd9cbd965"  # on every machine
    assert len({rows_digest(rows), rows_digest(rows[::-1]), rows_digest(rows[:1])}) == 3


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 1.0)), min_size=2, max_size=4), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_mixtures_keep_their_shares(parts, seed):
    counts = [count for count, _ in parts]
    shares = [share / sum(share for _, share in parts) for _, share in parts]
    for interleave in (False, True):
        order = mix(counts, shares, seed=seed, interleave=interleave)
        assert order == mix(counts, shares, seed=seed, interleave=interleave)
        assert len(set(order)) == len(order)  # nothing twice
        used = [sum(source == place for source, _ in order) for place in range(len(counts))]
        total = min(count / share for count, share in zip(counts, shares, strict=True))
        assert used == [min(round(share * total), count) for share, count in zip(shares, counts, strict=True)]
    if order:
        for stop in range(1, len(order) + 1):  # every beginning has the shares, to a row per source
            for place, size in enumerate(used):
                seen = sum(source == place for source, _ in order[:stop])
                assert abs(seen - stop * size / len(order)) <= len(counts)


def test_fraction_is_trls(tmp_path):
    """The mixture `get_dataset` makes of the same sources: first rows, one source after another, none repeated."""
    from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, get_dataset

    paths = [jsonl(tmp_path / "a.jsonl", QA), jsonl(tmp_path / "b.jsonl", QA[5:])]
    specs = [{"path": "json", "data_files": path, "fraction": share} for path, share in zip(paths, (0.6, 0.2),
                                                                                           strict=True)]  # fmt: skip
    with quiet():
        theirs = get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig(**spec) for spec in specs]))["train"]
    mine = load(specs, phase="sft")
    assert mine.dataset["prompt"] == theirs["question"]
    assert [source.share for source in mine.sources] == pytest.approx([0.75, 0.25])


def test_a_pair_is_two_labels_for_kto_and_a_prompt_for_ppo(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}])
    loaded = load([{"path": path}], phase="kto")
    assert loaded.kind == "binary" and loaded.dataset.to_list() == [
        {"prompt": "p", "completion": "c", "label": True},
        {"prompt": "p", "completion": "r", "label": False},
    ]
    loaded = load([{"path": jsonl(tmp_path / "b.jsonl", QA[:1])}], phase="ppo")
    assert loaded.dataset.to_list() == [{"prompt": "What is 0 + 1?", "answer": "It is 1."}]
    loaded = load([{"path": str(tmp_path / "b.jsonl"), "prompt_template": "chat"}], phase="ppo")
    assert loaded.dataset.to_list() == [{"prompt": [user("What is 0 + 1?")], "answer": "It is 1."}]


MISTAKES = [
    ({"path": "a.jsonl", "splitt": "train"}, "unknown key in datasets 'splitt'.*did you mean 'split'"),
    ({"path": "b.jsonl"}, "no data file .*near it: a.jsonl"),
    ({"path": "gone/b.jsonl"}, "the folder gone does not exist"),
    ({"path": "a.xml"}, "cannot read .xml; known: .jsonl"),
    ({"path": "torn.jsonl"}, "torn.jsonl, line 2: not JSON"),
    ({"path": "list.jsonl"}, "list.jsonl, line 1: a row must be a JSON object, got list"),
    ({"path": "torn.json"}, "torn.json, line 2: not JSON"),
    ({"path": "torn.csv"}, "torn.csv, line 3: not 2 columns"),
    ({"path": "torn.parquet"}, "torn.parquet: not Parquet"),
    ({"path": "latin.jsonl"}, "latin.jsonl, line 2: not UTF-8"),
    ({"path": "empty.jsonl"}, "empty.jsonl, split train: no rows"),
    ({"path": "a.jsonl", "split": "train[20:]"}, "no rows"),
    ({"path": "a.jsonl", "split": "test"}, "has only the split 'train', not 'test'"),
    ({"path": "a.jsonl", "format": "alpacca"}, "unknown format 'alpacca'.*did you mean 'alpaca'"),
    ({"path": "a.jsonl", "format": "text"}, "no column 'text'; found question, answer"),
    ({"path": "a.jsonl", "columns": ["question", "anwser"]}, "unknown column of .*'anwser'.*did you mean 'answer'"),
    ({"path": "a.jsonl", "weight": -1}, "weight must be a positive number, got -1"),
    ({"path": "a.jsonl", "max_samples": 1.5}, "max_samples must be a positive whole number"),
    ({"path": "pairs.jsonl"}, "preference rows cannot be used by sft, which takes prompt_completion or messages"),
    ({"path": "card:gsm8k", "split": "validation"}, "unknown split of card gsm8k 'validation'; known: test, train"),
    ({"path": "card:sums_pairs", "split": "dev"}, "unknown split of card sums_pairs 'dev'"),
    ({"path": "card:sums_pairs"}, "cannot be used by sft"),
    ({"path": "card:sums_sft", "data_files": "a.jsonl"}, "card:sums_sft: data_files does not apply"),
    ({"path": "card:gsm8k", "data_files": "a.jsonl"}, "card:gsm8k: data_files does not apply"),
    ({"path": "a.jsonl", "prompt_template": "Q:"}, "'Q:' must be 'chat' or a text that holds {prompt}"),
    ({"path": ""}, "needs a path"),
    ({"path": "card:tinyshakespeare"}, "set ALIGN_KIT_DATA to it; without a download, use card:"),
]  # fmt: skip


@pytest.fixture
def folder_of_mistakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ALIGN_KIT_DATA", raising=False)
    jsonl(tmp_path / "a.jsonl", QA)
    jsonl(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}])
    contents = {"a.xml": "<a/>", "torn.jsonl": '{"text": "x"}\n{"text": ', "list.jsonl": "[1]\n", "empty.jsonl": "\n",
                "torn.json": "[{},\n{]", "torn.csv": "a,b\n1,2\n1,2,3\n", "torn.parquet": "PAR1"}  # fmt: skip
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xe9"}\n')


def test_a_split_that_nobody_named_is_not_called_unknown():
    with pytest.raises(UserError, match="card gsm8k has no split 'dev', the one read where none is named; name one: "):
        load([{"path": "card:gsm8k"}], phase="sft", split_default="dev")


@pytest.mark.usefixtures("folder_of_mistakes")
@pytest.mark.parametrize("spec, said", MISTAKES, ids=[said[:40] for _, said in MISTAKES])
def test_a_mistake_is_one_line(spec, said):
    if "card:sums" in spec["path"]:
        pytest.importorskip("align_kit.data.embedded.sums")
    with pytest.raises(UserError, match=said) as caught:
        load([spec], phase="sft" if "tiny" not in spec["path"] else "pretrain")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.usefixtures("folder_of_mistakes")
def test_mistakes_between_sources():
    with pytest.raises(UserError, match="one run trains on one kind"):
        load([{"path": "a.jsonl"}, {"path": "a.jsonl", "format": "text", "columns": {"text": "answer"}}], phase="sft")
    with pytest.raises(UserError, match="fraction and weight were both given"):
        load([{"path": "a.jsonl", "weight": 1}, {"path": "a.jsonl", "fraction": 1}], phase="sft")
    with pytest.raises(UserError, match="fraction must be given for every source or for none"):
        load([{"path": "a.jsonl"}, {"path": "a.jsonl", "fraction": 0.5}], phase="sft")
    with pytest.raises(UserError, match="no data: name a source"):
        load([], phase="sft")


def test_offline_a_hub_set_names_a_built_in_card(monkeypatch, tmp_path):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for path in ("card:ultrafeedback_binarized", "someone/something"):
        with pytest.raises(UserError, match="from the hub: .*without a download, use card:sums_pairs"):
            load([{"path": path}], phase="dpo")


def test_a_hub_set_is_read_through_load_dataset(tmp_path):
    """A folder stands in for the hub: the same call, the same slices, nothing printed."""
    jsonl(tmp_path / "train.jsonl", QA)
    rows = read_hub(str(tmp_path), "train", ["train[:80%]", "train[-2:]"], name=None, revision=None)
    assert rows == QA[6:8]
    with pytest.raises(UserError, match="cannot load .*Unknown split"):
        read_hub(str(tmp_path), "validation", ["validation"])


def test_a_phase_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="unknown phase 'dp0'.*did you mean 'dpo'"):
        load([{"path": "a.jsonl"}], phase="dp0")


def test_licences_and_warnings_reach_the_report(tmp_path):
    jsonl(tmp_path / "a.jsonl", QA)
    (tmp_path / "mine.md").write_text(
        "---\npretty_name: Mine\nlicense: cc-by-nc-4.0\nalign_kit:\n  schema_version: 1\n  phases: [sft]\n"
        "  source:\n    kind: hub\n    path: me/mine\n    local: {train: a.jsonl}\n  format: prompt_completion\n"
        "  columns: {prompt: question, completion: answer}\n  splits: {train: train}\n  max_samples: 3\n"
        "  verified: true\n---\n"
    )
    loaded = load([{"path": f"card:{tmp_path / 'mine.md'}"}], phase="sft", data_home=tmp_path)
    assert loaded.warnings == ["card mine: licence 'cc-by-nc-4.0' forbids commercial use"]
    report = loaded.as_dict()
    assert report["sources"][0]["licences"] == ("cc-by-nc-4.0",) and report["rows"] == 3
    json.dumps(report)


def test_train_test_splits_without_overlap():
    dataset = to_dataset("text", [{"text": str(n)} for n in range(10)])
    train, test = train_test(dataset, 0.3, seed=1)
    assert sorted([*train["text"], *test["text"]], key=int) == dataset["text"] and len(test) == 3
    assert train["text"] == sorted(train["text"], key=int)
    assert train_test(dataset, 3, seed=1)[1]["text"] == test["text"] != train_test(dataset, 3, seed=2)[1]["text"]
    for size in (0.01, 10, 1.0 - 1e-9):
        with pytest.raises(UserError, match="test_split_size"):
            train_test(dataset, size)


REAL_CARDS = [
    ("gsm8k", "train", "sft", 7473),
    ("gsm8k", "test", "sft", 1319),
    ("gsm8k_solution_pairs", "train", "dpo", 731),
    ("gsm8k_solution_labels", "train", "kto", 5276),
    ("llamafactory_dpo_en", "train", "dpo", 299),
    ("llamafactory_c4_demo", "train", "pretrain", 300),
    ("tinyshakespeare", "train", "pretrain", 1),
    ("xstest_pairs", "train", "dpo", 244),
    ("xstest_prompts", "test", "eval", 450),
    ("truthfulqa", "test", "dpo", 790),
    ("self_instruct", "train", "sft", 175),
    ("self_instruct", "test", "sft", 252),
]
REAL_PATHS = [
    ("gsm8k/train.jsonl", "sft", 7473),
    ("gsm8k", "sft", 7473),
    ("gsm8k/model_solutions_pairs.jsonl", "dpo", 731),
    ("llamafactory_dpo_en/dpo_en_demo.json", "dpo", 299),
    ("xstest/xstest_prompts.csv", "ppo", 450),
    ("tinyshakespeare/input.txt", "pretrain", 1),
]


@needs_real_data
@pytest.mark.parametrize("name, split, phase, rows", REAL_CARDS)
def test_real_files_load_through_their_cards(name, split, phase, rows):
    loaded = load([{"path": f"card:{name}", "split": split}], phase=phase, data_home=REAL)
    assert len(loaded.dataset) == rows and loaded.warnings == []
    assert all(value for row in loaded.dataset.to_list()[:50] for value in row.values() if value is not False)


@needs_real_data
@pytest.mark.parametrize("path, phase, rows", REAL_PATHS)
def test_real_files_load_by_path(path, phase, rows):
    assert len(load([{"path": str(REAL / path)}], phase=phase).dataset) == rows


@needs_real_data
def test_shakespeare_is_divided_and_not_changed():
    path = "card:tinyshakespeare"
    parts = [load([{"path": path, "split": split}], phase="pretrain", data_home=REAL).dataset
             for split in ("train", "validation", "test")]  # fmt: skip
    assert "".join(part[0]["text"] for part in parts) == (REAL / "tinyshakespeare" / "input.txt").read_text(
        encoding="utf-8"
    )


BUILT_IN = [("cpython_docs", "pretrain"), ("sums_text", "pretrain"), ("sums_sft", "sft"), ("sums_pairs", "dpo"),
            ("sums_labels", "kto"), ("sums_prompts", "ppo"), ("sums_reason", "sft"),
            ("sums_reason", "ppo")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, phase", BUILT_IN)
def test_built_in_cards_load(name, phase):
    pytest.importorskip("align_kit.data.embedded.sums")
    for split in ("train", "validation", "test"):
        loaded = load([{"path": f"card:{name}", "split": split}], phase=phase)
        assert len(loaded.dataset) > 100 and loaded.warnings == []
        assert loaded.sources[0].facts["version"]
