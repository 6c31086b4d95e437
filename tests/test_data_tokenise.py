"""Tokenised data: packing is exact, truncation is counted, the cache is keyed by content and survives damage."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import shutil

import pytest
from datasets import Dataset

from align_kit.data import store
from align_kit.data import tokenise as module
from align_kit.data.load import load, to_dataset
from align_kit.data.tokenise import TokeniseOptions, cache_key, pack, tokenise, tokenizer_digest
from align_kit.errors import UserError
from tests.data_rows import REAL, STRINGS, assistant, chat_tokenizer, needs_real_data, trl_template, user

TEXTS = [{"text": f"Document {n}: " + "abc def. " * n} for n in range(1, 30)]
SFT = [{"prompt": row["prompt"], "completion": row["completion"]} for row in STRINGS]


def tokens(rows, kind, tmp_path, tokenizer=None, **options):
    """Return the tokenised rows and report of `rows`."""
    tokenizer = tokenizer or chat_tokenizer(trl_template("qwen2_5"))
    return tokenise(to_dataset(kind, rows), kind, tokenizer, TokeniseOptions(**options), tmp_path)


def test_packing_loses_only_the_tail(tmp_path):
    tokenizer = chat_tokenizer(None)
    packed, report = tokens(TEXTS, "text", tmp_path, tokenizer, max_length=16, packing=True)
    stream = list(itertools.chain.from_iterable(tokenizer([row["text"] + "<|im_end|>" for row in TEXTS])["input_ids"]))
    full = len(stream) // 16
    assert list(itertools.chain.from_iterable(packed["input_ids"])) == stream[: full * 16]
    assert all(len(ids) == 16 == sum(mask) for ids, mask in zip(packed["input_ids"], packed["loss_mask"], strict=True))
    assert (report.rows_out, report.leftover_tokens, report.tokens) == (full, len(stream) % 16, full * 16)
    assert f"{len(stream) % 16} tokens left over" in report.sentence()


def test_packing_equals_trls_wrapped_strategy(tmp_path):
    from trl.data_utils import pack_dataset

    from align_kit.data.read import quiet

    tokenizer = chat_tokenizer(None)
    plain, _ = tokens(TEXTS, "text", tmp_path, tokenizer, max_length=None)
    packed, report = tokens(TEXTS, "text", tmp_path, tokenizer, max_length=16, packing=True)
    with quiet():
        theirs = pack_dataset(plain.select_columns(["input_ids"]), 16, "wrapped")["input_ids"]
    assert packed["input_ids"][:] == [row for row in theirs if len(row) == 16]
    again, other = pack(plain, 16, tokenizer.eos_token_id)
    assert again["input_ids"][:] == packed["input_ids"][:] and other.leftover_tokens == report.leftover_tokens


def test_pack_puts_eos_between_rows_that_lack_it():
    packed, report = pack(Dataset.from_dict({"input_ids": [[5, 6], [7, 2], [8]]}), 3, eos=2)
    assert packed["input_ids"][:] == [[5, 6, 2], [7, 2, 8]] and report.leftover_tokens == 1


def test_empty_text_is_dropped_and_counted(tmp_path):
    rows = [{"text": "a"}, {"text": "  \n"}, {"text": ""}]
    for packing in (False, True):
        _, report = tokens(rows, "text", tmp_path, max_length=2, packing=packing)
        assert report.dropped == {"empty text": 2} and report.rows_out == 1


def test_the_report_adds_up(tmp_path):
    rows, report = tokens(SFT, "prompt_completion", tmp_path, max_length=40)
    assert report.rows_in == report.rows_out + sum(report.dropped.values()) == 5
    assert report.rows_out == len(rows)
    assert report.tokens == sum(map(len, rows["input_ids"])) and report.max_tokens == 40
    assert report.trained_tokens == sum(map(sum, rows["loss_mask"]))
    assert report.dropped == {"prompt fills max_length": 1} and report.cut_completions == report.cut == 1
    assert report.as_dict()["mean_tokens"] == pytest.approx(report.tokens / 4, abs=0.01)
    for said in ("dropped 1 (20.0%), prompt fills max_length", "1 (20.0%) completions cut", f"{report.tokens} tokens"):
        assert said in report.sentence()


def test_a_pairs_faults_are_counted(tmp_path):
    rows = [{"prompt": "p", "chosen": "same", "rejected": "same"}, {"prompt": "p", "chosen": "x", "rejected": ""}]
    _, report = tokens(rows, "preference", tmp_path)
    assert (report.identical_pairs, report.empty_completions) == (1, 1)
    assert "1 (50.0%) pairs have chosen = rejected" in report.sentence()


def test_binary_and_prompt_rows(tmp_path):
    tokenizer = chat_tokenizer(trl_template("qwen2_5"))
    rows = [{"prompt": "abc ", "completion": "def", "label": True}, {"prompt": "x", "completion": "y", "label": False}]
    labelled, _ = tokens(rows, "binary", tmp_path, tokenizer)
    assert labelled["label"][:] == [True, False]
    assert tokenizer.decode(labelled[0]["prompt_ids"] + labelled[0]["completion_ids"]) == "abc def<|im_end|>"
    rows = [{"prompt": "abc ", "answer": "#### 7"}, {"prompt": [user("hi")], "answer": None}]
    prompts, report = tokens(rows, "prompt", tmp_path, tokenizer)
    assert prompts["answer"][:] == ["#### 7", None]
    assert prompts["prompt"][:] == ["abc ", [user("hi")]]  # as given: a reward reads these, not the rendered text
    assert tokenizer.decode(prompts[0]["prompt_ids"]) == "abc "
    assert tokenizer.decode(prompts[1]["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert report.trained_tokens == 0 and report.rows_out == 2


def test_chat_template_kwargs_reach_the_template(tmp_path):
    tokenizer = chat_tokenizer("{{ messages[0].content }}{{ mood }}<|im_end|>")
    rows = [{"messages": [user("a")], "chat_template_kwargs": {"mood": "b"}}, {"messages": [user("a")]}]
    said, _ = tokens(rows, "messages", tmp_path, tokenizer)
    assert [tokenizer.decode(ids) for ids in said["input_ids"]] == ["ab<|im_end|>", "a<|im_end|>"]


def test_a_last_turn_of_the_users_is_no_missing_end(tmp_path):
    rows = [{"messages": [user("a"), assistant("b"), user("c" * 30)]}]
    _, report = tokens(rows, "messages", tmp_path, assistant_only_loss=True)
    assert report.unended == 0


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    with pytest.raises(UserError, match="no row is left .*prompt fills max_length.*raise max_length"):
        tokens(SFT[3:4], "prompt_completion", tmp_path, max_length=8)
    assert [item for item in tmp_path.iterdir() if not item.name.endswith(".lock")] == []


BAD_OPTIONS = [({"truncation_mode": "keep_stat"}, "unknown truncation_mode"), ({"max_length": 1}, "needs 2 tokens"),
               ({"packing": True, "max_length": None}, "packing needs max_length")]  # fmt: skip


@pytest.mark.parametrize("options, said", BAD_OPTIONS)
def test_bad_options(options, said):
    with pytest.raises(UserError, match=said):
        TokeniseOptions(**options)


def test_packing_is_for_text_and_masks_for_conversations(tmp_path):
    with pytest.raises(UserError, match="packing joins text rows"):
        tokens(SFT, "prompt_completion", tmp_path, packing=True)
    with pytest.raises(UserError, match="completion_only_loss needs prompt and completion"):
        tokens(TEXTS, "text", tmp_path, completion_only_loss=True)
    with pytest.raises(UserError, match="unknown row kind 'text_only'"):
        tokenise(to_dataset("text", TEXTS), "text_only", chat_tokenizer(None), TokeniseOptions(), tmp_path)
    with pytest.raises(UserError, match="assistant_only_loss needs conversations"):
        tokens(SFT, "prompt_completion", tmp_path, assistant_only_loss=True)


def test_assistant_only_loss_of_prompt_completion_is_the_assistants_part(tmp_path):
    """Both masks apply, as in TRL: an earlier assistant turn in the prompt is not trained."""
    tokenizer = chat_tokenizer(trl_template("qwen2_5_training"))
    rows = [{"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d"), user("e")]}]
    masked, _ = tokens(rows, "prompt_completion", tmp_path, tokenizer, assistant_only_loss=True)
    trained = [token for token, kept in zip(masked[0]["input_ids"], masked[0]["loss_mask"], strict=True) if kept]
    assert tokenizer.decode(trained).strip() == "d<|im_end|>"


def test_the_second_call_reads_the_first_ones_file(tmp_path):
    first, report = tokens(SFT, "prompt_completion", tmp_path)
    second, again = tokens(SFT, "prompt_completion", tmp_path)
    assert (report.cached, again.cached) == (False, True)
    assert first.to_list() == second.to_list() and first.cache_files == second.cache_files
    assert dataclasses.replace(again, cached=False) == report


def test_the_key_is_the_content():
    tokenizer, options = chat_tokenizer("{{ messages }}"), TokeniseOptions()
    dataset = to_dataset("prompt_completion", SFT)
    key = cache_key(dataset, "prompt_completion", tokenizer, options)
    assert cache_key(to_dataset("prompt_completion", SFT), "prompt_completion", tokenizer, options) == key
    assert cache_key(dataset.select(range(5)), "prompt_completion", chat_tokenizer("{{ messages }}"), options) == key
    added = chat_tokenizer("{{ messages }}")
    added.add_tokens(["<new>"])
    others = [
        cache_key(dataset.select(range(4)), "prompt_completion", tokenizer, options),
        cache_key(dataset.select([1, 0, 2, 3, 4]), "prompt_completion", tokenizer, options),
        cache_key(dataset, "prompt_completion", chat_tokenizer("{{ messages }} "), options),
        cache_key(dataset, "prompt_completion", chat_tokenizer("{{ messages }}", eos="<|endoftext|>"), options),
        cache_key(dataset, "prompt_completion", added, options),
        *(cache_key(dataset, "prompt_completion", tokenizer, dataclasses.replace(options, **change)) for change in (
            {"max_length": 512}, {"truncation_mode": "keep_end"}, {"completion_only_loss": False},
            {"assistant_only_loss": True}, {"chat_template": "x"})),
    ]  # fmt: skip
    assert len({key, *others}) == len(others) + 1


def test_using_a_tokenizer_does_not_change_its_digest():
    tokenizer = chat_tokenizer(None)
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(tokenizer) == before


def test_the_schema_version_is_in_the_key(monkeypatch):
    dataset, tokenizer = to_dataset("text", TEXTS), chat_tokenizer(None)
    key = cache_key(dataset, "text", tokenizer, TokeniseOptions())
    monkeypatch.setattr(module, "SCHEMA_VERSION", module.SCHEMA_VERSION + 1)
    assert cache_key(dataset, "text", tokenizer, TokeniseOptions()) != key


def _spoil_report(entry):
    (entry / "report.json").write_text("{")


def _flip_a_byte(entry):
    data = bytearray((entry / "rows.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (entry / "rows.arrow").write_bytes(bytes(data))


def _cut_short(entry):
    data = (entry / "rows.arrow").read_bytes()
    (entry / "rows.arrow").write_bytes(data[: len(data) // 2])


def _lose_report(entry):
    (entry / "report.json").unlink()


def _leave_only_a_folder(entry):
    shutil.rmtree(entry)
    entry.mkdir()


@pytest.mark.parametrize("damage", [_spoil_report, _flip_a_byte, _cut_short, _lose_report, _leave_only_a_folder])
def test_a_damaged_entry_is_built_again(tmp_path, damage):
    whole, report = tokens(SFT, "prompt_completion", tmp_path)
    rows = whole.to_list()
    del whole
    damage(tmp_path / report.digest)
    again, rebuilt = tokens(SFT, "prompt_completion", tmp_path)
    assert again.to_list() == rows and not rebuilt.cached
    assert tokens(SFT, "prompt_completion", tmp_path)[1].cached
    assert [item.name for item in tmp_path.iterdir() if not item.name.endswith(".lock")] == [report.digest]


def test_a_build_that_dies_leaves_nothing_to_read(tmp_path):
    def dies(write):
        write({"input_ids": [[1]], "loss_mask": [[1]]})
        raise RuntimeError("killed")

    columns = {"input_ids": "ids", "loss_mask": "mask"}
    with pytest.raises(RuntimeError):
        store.fetch(tmp_path / "key", columns, dies)
    assert not (tmp_path / "key").exists()


def _fetch_counted(folder, results):
    def build(write):
        write({"input_ids": [[1, 2]], "loss_mask": [[0, 1]]})
        return {"made": 1}

    rows, _, cached = store.fetch(folder / "key", {"input_ids": "ids", "loss_mask": "mask"}, build)
    results.put((rows["input_ids"][:], cached))


@pytest.mark.slow
def test_ranks_that_start_together_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_fetch_counted, args=(tmp_path, results)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    got = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert sorted(cached for _, cached in got) == [False, True, True]
    assert all(rows == [[1, 2]] for rows, _ in got)


def test_a_cache_that_cannot_be_written_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write tokenised data"):
        tokens(SFT, "prompt_completion", tmp_path / "file")


def written(row):
    """Return what a canonical row's sequences must say: whole strings, or the last message of a conversation."""
    answers = [row[name] for name in ("completion", "chosen", "rejected") if name in row] or [""]
    if isinstance(row["prompt"], str):
        return [row["prompt"] + answer for answer in answers]
    return [answer[-1]["content"].strip() for answer in answers]


@pytest.mark.slow
@needs_real_data
@pytest.mark.parametrize("name, split, phase", [
    ("gsm8k", "train", "sft"), ("gsm8k_solution_pairs", "train", "dpo"), ("llamafactory_dpo_en", "train", "dpo"),
    ("xstest_pairs", "train", "dpo"), ("gsm8k_solution_labels", "train", "kto"), ("xstest_prompts", "test", "eval"),
])  # fmt: skip
def test_real_rows_say_what_the_files_say(tmp_path, name, split, phase):
    tokenizer = chat_tokenizer(trl_template("qwen2_5"))
    loaded = load([{"path": f"card:{name}", "split": split}], phase=phase, data_home=REAL)
    options = TokeniseOptions(max_length=None)
    rows, report = tokenise(loaded.dataset, loaded.kind, tokenizer, options, tmp_path)
    assert report.dropped == {} and report.cut == 0 and report.unended == 0
    for place in range(0, len(rows), 25):
        row, source = rows[place], loaded.dataset[place]
        answers = [row[key] for key in ("completion_ids", "chosen_ids", "rejected_ids") if key in row] or [[]]
        said = [tokenizer.decode(row.get("input_ids") or row["prompt_ids"] + answer) for answer in answers]
        for text, heard in zip(written(source), said, strict=True):
            assert heard.removesuffix("<|im_end|>") == text if isinstance(source["prompt"], str) else text in heard


@pytest.mark.slow
@needs_real_data
def test_packed_shakespeare_is_shakespeare(tmp_path):
    tokenizer = chat_tokenizer(None)
    loaded = load([{"path": str(REAL / "tinyshakespeare" / "input.txt")}], phase="pretrain")
    options = TokeniseOptions(max_length=256, packing=True)
    rows, report = tokenise(loaded.dataset, loaded.kind, tokenizer, options, tmp_path)
    said = tokenizer.decode(list(itertools.chain.from_iterable(rows["input_ids"])))
    assert loaded.dataset[0]["text"].startswith(said) and report.leftover_tokens < 256


def test_the_embedded_tokenizer_works_end_to_end(tmp_path):
    tiny = pytest.importorskip("align_kit.data.embedded").__path__[0] + "/tiny"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    loaded = load([{"path": "card:sums_sft", "split": "validation"}], phase="sft")
    rows, report = tokenise(loaded.dataset, loaded.kind, tokenizer, TokeniseOptions(max_length=128), tmp_path)
    assert report.dropped == {} and report.cut == 0 and report.prompt_shortened == 0
    assert all(ids[-1] == tokenizer.eos_token_id and mask[-1] == 1 for ids, mask in
               zip(rows["input_ids"], rows["loss_mask"], strict=True))  # fmt: skip
