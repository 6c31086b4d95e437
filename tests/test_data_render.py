"""Token ids and masks equal TRL's on the same rows: strings and conversations, SFT and DPO, cut and whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import DPOTrainer, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from align_kit.data.collate import LanguageCollator, PreferenceCollator
from align_kit.data.load import to_dataset
from align_kit.data.render import Renderer, common_prefix
from align_kit.data.tokenise import TokeniseOptions, tokenise
from align_kit.errors import UserError
from tests.data_rows import CHATS, STRINGS, assistant, bos_tokenizer, chat_tokenizer, trl_template, user

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
TOOL_CHAT = [
    user("What is 3 + 4?"),
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}]},
    {"role": "tool", "content": "7"},
    assistant("It is 7."),
]  # fmt: skip
TURNS = [user("hi"), assistant("hello"), user("What is 3?"), assistant("three  ")]


def trl_sft(rows, tokenizer, *, max_length=None, mode="keep_start", assistant_only=False, completion_only=None):
    """Return TRL's own input_ids and labels for `rows`, through its preparation code."""
    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer._tokenizer = tokenizer
    trainer.chat_template = None
    if assistant_only and not has_generation_markers(tokenizer.chat_template):
        trainer.chat_template = get_training_chat_template(tokenizer)
    default = "prompt" in rows[0] and "completion" in rows[0]
    trainer.completion_only_loss = default if completion_only is None else completion_only
    args = SimpleNamespace(
        dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=assistant_only, max_length=max_length,
        truncation_mode=mode, shuffle_dataset=False,
    )  # fmt: skip
    names = {name for row in rows for name in row}
    rows = [{name: row.get(name) for name in names} for row in rows]
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    return trainer._prepare_dataset(dataset, tokenizer, args, False, None, "train")


def trl_dpo(rows, tokenizer, *, max_length=None, mode="keep_start"):
    """Return TRL's own prompt_ids, chosen_ids and rejected_ids for `rows`."""
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=mode)
    return trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, args, "train")


def ours(rows, kind, tokenizer, tmp_path, **options):
    """Return our tokenised rows and report."""
    options = {"max_length": None, "control_tokens": "tokens", **options}  # as TRL reads them
    return tokenise(to_dataset(kind, rows), kind, tokenizer, TokeniseOptions(**options), tmp_path)


def same_language(mine: Dataset, theirs: Dataset) -> None:
    """Compare as batches: ids, and labels where our loss mask is 1."""
    assert mine["input_ids"] == theirs["input_ids"]
    batch = LanguageCollator(pad_token_id=0)([mine[place] for place in range(len(mine))])
    columns = theirs.select_columns(["input_ids", "labels"])
    want = DataCollatorForLanguageModeling(pad_token_id=0)([columns[place] for place in range(len(columns))])
    assert (batch["input_ids"] == want["input_ids"]).all()
    assert (batch["attention_mask"] == want["attention_mask"]).all()
    assert (batch["loss_mask"] == (want["labels"] != -100)).all()


def completions(rows):
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]


def pairs(rows):
    return [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["rejected"]} for row in rows]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("rows, max_length", [(STRINGS, None), (STRINGS, 40), (CHATS, None), (CHATS, 160)])
def test_sft_tokens_equal_trl(rows, max_length, mode, tmp_path):
    tokenizer = chat_tokenizer(trl_template("qwen2_5"))
    rows = completions(rows)
    mine, _ = ours(rows, "prompt_completion", tokenizer, tmp_path, max_length=max_length, truncation_mode=mode)
    same_language(mine, trl_sft(rows, tokenizer, max_length=max_length, mode=mode))


@pytest.mark.parametrize("rows", [STRINGS, CHATS], ids=["strings", "chats"])
def test_whole_sequence_loss_equals_trl(rows, tmp_path):
    tokenizer = chat_tokenizer(trl_template("qwen2_5"))
    mine, _ = ours(completions(rows), "prompt_completion", tokenizer, tmp_path, completion_only_loss=False)
    same_language(mine, trl_sft(completions(rows), tokenizer, completion_only=False))


@pytest.mark.parametrize("rows", [STRINGS, CHATS], ids=["strings", "chats"])
def test_a_tokenizer_that_adds_bos_writes_one(rows, tmp_path):
    """A string gets the tokenizer's BOS, a conversation the one its template writes; neither gets two."""
    tokenizer = bos_tokenizer(trl_template("llama3"))
    mine, _ = ours(completions(rows), "prompt_completion", tokenizer, tmp_path)
    same_language(mine, trl_sft(completions(rows), tokenizer))
    assert all(ids.count(tokenizer.bos_token_id) == 1 == ids[0:1].count(tokenizer.bos_token_id) for ids in
               mine["input_ids"])  # fmt: skip


def test_text_and_messages_equal_trl(tmp_path):
    tokenizer = chat_tokenizer(trl_template("llama3"), eos="<|eot_id|>")
    texts = [{"text": "abc def"}, {"text": "ends<|eot_id|>"}, {"text": "What is 3 + 4? " * 30}]
    mine, report = ours(texts, "text", tokenizer, tmp_path, max_length=64)
    same_language(mine, trl_sft(texts, tokenizer, max_length=64))
    assert (report.cut, report.unended) == (1, 0)
    chats = [{"messages": TURNS}, {"messages": TURNS[:2]}]
    mine, _ = ours(chats, "messages", tokenizer, tmp_path)
    same_language(mine, trl_sft(chats, tokenizer))


def tokenizer_and_rows(name):
    """Return a tokenizer with the template `name` and conversations it can render, tool calls where it knows them."""
    llama = name.startswith("llama")
    tokenizer = chat_tokenizer(trl_template(name), eos="<|eot_id|>" if llama else "<|im_end|>")
    return tokenizer, [{"messages": TURNS}] + ([] if llama else [{"messages": TOOL_CHAT, "tools": TOOLS}])


@pytest.mark.parametrize("name", ["qwen2_5_training", "llama3_training", "qwen3_training"])
def test_generation_markers_give_trls_mask(name, tmp_path):
    tokenizer, rows = tokenizer_and_rows(name)
    mine, report = ours(rows, "messages", tokenizer, tmp_path, assistant_only_loss=True)
    same_language(mine, trl_sft(rows, tokenizer, assistant_only=True))
    assert report.unended == 0


@pytest.mark.parametrize("name", ["qwen2_5", "llama3"])
def test_without_markers_the_mask_is_what_the_assistant_writes(name, tmp_path):
    """From after the generation prompt to the end token; TRL's patched templates train that and white space around."""
    tokenizer, rows = tokenizer_and_rows(name)
    mine, _ = ours(rows, "messages", tokenizer, tmp_path, assistant_only_loss=True)
    trained = [token for token, kept in zip(mine[0]["input_ids"], mine[0]["loss_mask"], strict=True) if kept]
    end = tokenizer.eos_token
    assert tokenizer.decode(trained) in (f"hello{end}three{end}", f"hello{end}three  {end}")  # Llama 3's trims
    theirs = trl_sft(rows, tokenizer, assistant_only=True)
    assert mine["input_ids"] == theirs["input_ids"]
    for place, labels in enumerate(theirs["labels"]):
        masks = zip(mine[place]["input_ids"], mine[place]["loss_mask"], labels, strict=True)
        more = [token for token, kept, label in masks if (label != -100) != bool(kept)]
        assert tokenizer.decode(more).strip() == ""


def test_tool_calls_survive_the_data_set(tmp_path):
    tokenizer = chat_tokenizer(trl_template("qwen2_5"))
    mine, _ = ours([{"messages": TOOL_CHAT, "tools": TOOLS}], "messages", tokenizer, tmp_path)
    said = tokenizer.decode(mine[0]["input_ids"])
    assert '{"name": "add", "arguments": {"a": 3, "b": 4}}' in said
    assert '"name": "add", "parameters"' in said and "<tool_response>\n7" in said


@pytest.mark.parametrize("rows", [STRINGS, CHATS], ids=["strings", "chats"])
def test_dpo_tokens_equal_trl(rows, tmp_path):
    tokenizer = chat_tokenizer(trl_template("qwen2_5"))
    mine, report = ours(pairs(rows), "preference", tokenizer, tmp_path)
    theirs = trl_dpo(pairs(rows), tokenizer)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert mine[name] == theirs[name]
    assert report.rows_out == len(rows) and not report.dropped
    assert all(ids[-1] == tokenizer.eos_token_id for ids in mine["chosen_ids"]) or rows is CHATS


@pytest.mark.parametrize("rows, limit", [(STRINGS, 48), (CHATS, 160)], ids=["strings", "chats"])
def test_truncated_pairs_equal_trls_batches(rows, limit, tmp_path):
    tokenizer = chat_tokenizer(trl_template("qwen2_5"))
    mine, report = ours(pairs(rows), "preference", tokenizer, tmp_path, max_length=limit)
    theirs = trl_dpo(pairs(rows), tokenizer, max_length=limit)
    batch = PreferenceCollator(pad_token_id=0)([mine[place] for place in range(len(mine))])
    columns = theirs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    want = DataCollatorForPreference(pad_token_id=0, max_length=limit)([columns[i] for i in range(len(columns))])
    assert (batch["input_ids"] == want["input_ids"]).all()
    assert (batch["attention_mask"] == want["attention_mask"]).all()
    assert (batch["loss_mask"] == want["completion_mask"]).all()
    assert report.dropped == {"prompt fills max_length": 1} and report.cut_completions >= 1
    assert "dropped 1 (20.0%), prompt fills max_length" in report.sentence()


def test_keep_end_cuts_the_prompt_and_keeps_whole_completions(tmp_path):
    tokenizer = chat_tokenizer(None)
    rows = [{"prompt": "long " * 60, "chosen": "It is 7.", "rejected": "no"},
            {"prompt": "p", "chosen": "long " * 60, "rejected": "no"}]  # fmt: skip
    mine, report = ours(rows, "preference", tokenizer, tmp_path, max_length=32, truncation_mode="keep_end")
    (row,) = (mine[place] for place in range(len(mine)))
    assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) == 32
    assert tokenizer.decode(row["chosen_ids"]) == " It is 7.<|im_end|>"
    assert report.dropped == {"completion fills max_length": 1} and report.cut_completions == 0


def test_drop_mode_keeps_only_whole_rows(tmp_path):
    mine, report = ours(pairs(STRINGS), "preference", chat_tokenizer(None), tmp_path, max_length=48,
                        truncation_mode="drop")  # fmt: skip
    assert report.cut == 0 and report.dropped["longer than max_length"] == 2 and len(mine) == 3


def test_no_chat_template_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no chat template; give one in chat_template_path"):
        ours([{"messages": TURNS}], "messages", chat_tokenizer(None), tmp_path)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    forgetful = "{% for m in messages %}{{ m.role if loop.last else '' }}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="renders earlier turns differently"):
        ours([{"messages": TURNS}], "messages", chat_tokenizer(forgetful), tmp_path, assistant_only_loss=True)


def test_a_refused_role_is_named(tmp_path):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    with pytest.raises(UserError, match="roles assistant: user first; it begins .hello.$"):
        ours([{"messages": TURNS[1:2]}], "messages", chat_tokenizer(strict), tmp_path)


def test_a_template_without_an_end_token_is_counted(tmp_path):
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    _, report = ours([{"messages": TURNS}], "messages", chat_tokenizer(endless), tmp_path)
    assert report.unended == 1 and "1 (100.0%) rows train no end token" in report.sentence()


def test_merged_boundaries_are_counted(tmp_path):
    """'Say abc' + 'def' has other tokens than 'Say abc' alone only where merges cross; the report says how often."""
    tokenizer = chat_tokenizer(None)
    rows = completions(STRINGS)
    _, report = ours(rows, "prompt_completion", tokenizer, tmp_path)
    alone = tokenizer([row["prompt"] for row in rows])["input_ids"]
    whole = tokenizer([row["prompt"] + row["completion"] for row in rows])["input_ids"]
    crossed = sum(common_prefix(a, b) < len(a) for a, b in zip(alone, whole, strict=True))
    assert report.prompt_shortened == crossed


def test_no_eos_token_is_refused():
    tokenizer = chat_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        Renderer(tokenizer)


@pytest.mark.parametrize("a, b, length", [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1], 1), ([1, 2], [1, 3], 1)])
def test_common_prefix(a, b, length):
    assert common_prefix(a, b) == length
