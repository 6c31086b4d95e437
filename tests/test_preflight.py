"""What would waste a run is one line before its first step: a table of bad inputs, what is only suspicious, limits."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align_kit.config.suspicions import SUSPICIONS
from align_kit.data.health import inspect, judged, shares
from align_kit.data.render import Renderer
from align_kit.data.report import TokeniseReport
from align_kit.errors import UserError
from tests.harness import ROOT, Ranks, Result
from tests.small import Lab, lab_of, make_rows, make_tokenizer, words, write_rows

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]
PAIRS, ANSWERS = make_rows("preference", 8), make_rows("prompt_completion", 8)
LONG = {"prompt": "a b c d " * 40}


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


CHAT = [chat(("user", f"what is {n} and {n}"), ("assistant", f"{2 * n}")) for n in range(3)]


def with_fault(rows: Rows, **changes: Any) -> Rows:
    """Return three good rows, and a fourth with what is wrong."""
    return [*rows[:3], {**rows[3], **changes}]


def lines_of(rows: Rows, torn: bytes) -> bytes:
    """Return three good rows as they stand in a file, and a fourth line."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows[:3]) + torn


# name: phase, rows (or the file's bytes), the line; what is wrong is in line 4 wherever it is in one row.
DATA: dict[str, tuple[str, Rows | bytes, str]] = {
    "missing column": (
        "dpo",
        [{name: row[name] for name in ("prompt", "chosen")} for row in PAIRS],
        r"prompt rows cannot be used by dpo, .* columns found: prompt, chosen, missing: rejected$",
    ),
    "null in a row": ("dpo", with_fault(PAIRS, chosen=None), r"line 4: chosen must be a string or .*, got None$"),
    "null for a row": ("dpo", lines_of(PAIRS, b"null\n"), r"line 4: a row must be a JSON object, got NoneType$"),
    "not UTF-8": ("sft", lines_of(ANSWERS, b'{"prompt": "\xff"}\n'), r"line 4: not UTF-8 \(byte 0xff\)$"),
    "torn last line": ("sft", lines_of(ANSWERS, b'{"prompt": "a'), r"line 4: not JSON: Unterminated string"),
    "unknown role": (
        "sft",
        [*CHAT, chat(("user", "a"), ("robot", "b"))],
        r"line 4: unknown role in messages 'robot'; known: assistant, developer, .*; rename it$",
    ),
    "no content": ("sft", [*CHAT, {"messages": [{"role": "user"}]}], r"line 4: a user message in messages has no con"),
    "content that is a number": (
        "sft",
        [*CHAT, chat(("user", 3), ("assistant", "b"))],
        r"line 4: the content of a user message in messages must be text, got 3$",
    ),
    "every completion empty": (
        "sft",
        [{**row, "completion": ""} for row in ANSWERS],
        r"8 of 8 rows \(100.0%\) have an empty completion \(the first is row 1\); remove them, or let it pass with "
        r"--data_limits '\{\"empty\": 1\}'$",
    ),
    "chosen is rejected": (
        "dpo",
        [{**row, "rejected": row["chosen"]} for row in PAIRS],
        r"8 of 8 rows \(100.0%\) have chosen = rejected, from which nothing is learnt",
    ),
    "most too long": (
        "dpo",
        [*PAIRS[:3], *({**row, **LONG} for row in PAIRS[3:])],
        r"5 of 8 rows \(62.5%\) are dropped \(5 prompt fills max_length\); raise max_length",
    ),
    "all too long": ("dpo", [{**row, **LONG} for row in PAIRS], r"no row is left to train on: .*; raise max_length"),
    "ends cut off": ("sft", [{**row, "completion": LONG["prompt"]} for row in ANSWERS], r"lose the end of their compl"),
    "roles swapped": (
        "sft",
        [chat(("assistant", f"{n}"), ("user", "hello")) for n in range(8)],
        r"8 of 8 rows \(100.0%\) do not go from a user's turn to an assistant's .*; are the roles swapped\?",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def started(lab: Lab, folder: Path, phase: str, rows: Rows | bytes, **changes: Any) -> Result:
    """Return what a run of one step says of `rows`."""
    file = folder / "rows.jsonl"
    file.write_bytes(rows) if isinstance(rows, bytes) else write_rows(file, rows)
    asked = {"max_length": 64, "max_steps": 1, "datasets": [{"path": file}], "output_dir": folder / "out", **changes}
    return lab.ranks.run(phase, *words(lab.options(phase, **asked)), world_size=1, cwd=folder)


@pytest.mark.parametrize("name", DATA)
def test_bad_data_is_one_line(name: str, lab: Lab, tmp_path: Path) -> None:
    phase, rows, line = DATA[name]
    done = started(lab, tmp_path, phase, rows)
    assert re.search(line, done.error()), done.error()
    assert done.codes == [2]


# name: options, the line
OPTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "beta of nothing": ("dpo", {"beta": 0}, r"beta \(command line\) is 0; expected above 0$"),
    "unknown loss": ("dpo", {"loss_type": "sigmoidd"}, r"unknown loss_type 'sigmoidd'; .*did you mean 'sigmoid'\?"),
    "unknown loss of KTO": ("kto", {"loss_type": "ktoo"}, r"'ktoo'; allowed: kto, apo_zero_unpaired"),
    "unknown reward": ("ppo", {"reward_funcs": ["no.such:thing"]}, r"reward_funcs: 'no.such:thing' cannot be imported"),
    "folder nobody may write": ("sft", {"output_dir": "/proc/out"}, r"output_dir /proc/out cannot be written"),
    "unknown suspicion": ("sft", {"data_limits": {"droped": 1}}, r"unknown key of data_limits 'droped'; .*'dropped'"),
    "a limit that is no share": ("sft", {"data_limits": {"dropped": 2}}, r"data_limits: dropped is 2; give a share"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options_are_one_line_before_anything_loads(name: str, lab: Lab, tmp_path: Path) -> None:
    """The model named is not there, which is not reached."""
    phase, changes, line = OPTIONS[name]
    rows = make_rows(lab.kind(phase), 8)
    done = started(lab, tmp_path, phase, rows, **{"model_name_or_path": tmp_path / "no", **changes})
    assert re.search(line, done.error()) and done.codes == [2], done.error()


# --- the model --------------------------------------------------------------------------------------------------------


def harmed(act: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    """Return what rewrites the weights of a folder with `act` done to one of them."""

    def harm(place: Path) -> None:
        file = place / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        act(tensors, "model.layers.0.mlp.gate_proj.weight")
        save_file(tensors, file, metadata={"format": "pt"})

    return harm


def drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def cut(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].clone()


def put_nan(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name][0, 0] = float("nan")


def flip(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(torch.int32)[0, 0] ^= 1 << 30


def told_of_fewer_words(place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))


def with_an_empty_tokenizer(place: Path) -> None:
    (place / "tokenizer.json").write_text("{}")


def without_tokenizer(place: Path) -> None:
    for file in place.glob("token*"):
        file.unlink()


def with_fewer_embeddings(place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    tensors = load_file(place / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file({**tensors, name: tensors[name][:100].clone()}, place / "model.safetensors", metadata={"format": "pt"})


def with_two_templates(place: Path) -> None:
    told = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps({**told, "chat_template": "{{ messages }}"}))
    if not (place / "chat_template.jinja").exists():
        (place / "chat_template.jinja").write_text("{{ messages[0] }}")


def with_a_template_that_says_nothing(place: Path) -> None:
    (place / "chat_template.jinja").write_text("{% for m in messages %}<|{{ m.role }}|>{% endfor %}")


MODELS: dict[str, tuple[Callable[[Path], None], Rows, str]] = {
    "a tensor missing": (harmed(drop), ANSWERS, r"lacks 1 tensors of its configuration \(model.layers.0.mlp.gate_proj"),
    "a tensor of another shape": (
        harmed(cut), ANSWERS,
        r"holds in another shape 1 tensors of its configuration \(model.layers.0.mlp.gate_proj.weight is \[63, 32\], "
        r"wanted is \[64, 32\]\); ",
    ),
    "fewer words than embeddings": (
        told_of_fewer_words, ANSWERS, r"\(model.embed_tokens.weight is \[336, 32\], wanted is \[300, 32\]\); "
    ),
    "an empty tokenizer": (with_an_empty_tokenizer, ANSWERS, r"the tokenizer of \S+ cannot be loaded: KeyError: "),
    "NaN": (harmed(put_nan), ANSWERS, r"holds NaN or infinity in model.layers.0.mlp.gate_proj.weight; copy or downl"),
    "a flipped bit": (harmed(flip), ANSWERS, r"holds \d.\de\+\d+ in model.layers.0.mlp.gate_proj.weight, which is no "),
    "no tokenizer": (without_tokenizer, ANSWERS, r"has no tokenizer files; give --tokenizer_name$"),
    "words beyond the embedding": (with_fewer_embeddings, ANSWERS, r"has 3\d\d tokens and the model embeddings for 10"),
    "two chat templates": (with_two_templates, ANSWERS, r"has two chat templates that differ, in chat_template.jinja "),
    "a template that drops what is said": (
        with_a_template_that_says_nothing, [chat(("user", "hi"), ("assistant", f"say {n}")) for n in range(8)],
        r"8 of 8 rows \(100.0%\) lose what their last message says in the chat template",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model_is_one_line(name: str, lab: Lab, tmp_path: Path) -> None:
    harm, rows, line = MODELS[name]
    shutil.copytree(lab.model, tmp_path / "model")
    harm(tmp_path / "model")
    done = started(lab, tmp_path, "sft", rows, model_name_or_path=tmp_path / "model")
    assert re.search(line, done.error()) and done.codes == [2], done.error()


def test_a_model_of_a_run_that_was_changed_since_is_refused(lab: Lab, tmp_path: Path) -> None:
    run = lab.train("sft", world_size=1, max_steps=1)
    place = shutil.copytree(run.folder, tmp_path / "model")
    harmed(lambda tensors, name: tensors[name].mul_(1.001))(place)
    line = started(lab, tmp_path, "dpo", PAIRS, model_name_or_path=place).error()
    assert re.search(r"was changed or damaged since its run saved it \(digest \w{12}, saved \w{12}\); train it", line)


def test_another_template_than_the_models_own_is_said(lab: Lab, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "other.jinja").write_text(template)
    done = started(lab, tmp_path, "sft", CHAT, chat_template_path=tmp_path / "other.jinja", max_length=None).ok()
    assert "chat_template_path writes conversations otherwise than the template of " in done.text


# --- what is only suspicious ------------------------------------------------------------------------------------------


def test_what_is_suspicious_is_counted_and_a_limit_makes_it_an_error(lab: Lab, tmp_path: Path) -> None:
    turned = {**PAIRS[0], "chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]}
    rows = [PAIRS[0], *PAIRS[2:8], PAIRS[2], turned, {**PAIRS[1], "rejected": PAIRS[1]["chosen"]}]
    done = started(lab, tmp_path, "dpo", rows).ok()
    said = [line.partition(": ")[2].partition(": ")[2] for line in done.text.splitlines() if "warning: " in line]
    assert [line.partition(";")[0] for line in said] == [
        "1 of 10 rows (10.0%) have chosen = rejected, from which nothing is learnt (the first is row 10)",
        "1 of 10 rows (10.0%) stand in the data before (the first is row 8)",
        "1 of 10 rows (10.0%) say the opposite of a row before them (the first is row 9)",
    ]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["data"]["train"]["suspicions"]) == 3
    strict = started(lab, tmp_path, "dpo", rows, data_limits={"repeated": 0.05}, overwrite=True)
    assert "1 of 10 rows (10.0%) stand in the data before (the first is row 8); remove" in strict.error()


def report_of(rows: Rows, kind: str, parts: int = 1) -> TokeniseReport:
    report, seen = TokeniseReport(kind, rows_in=len(rows)), {}
    renderer = Renderer(make_tokenizer())
    size = -(-len(rows) // parts)
    for start in range(0, len(rows), size):
        inspect(rows[start : start + size], kind, renderer, report, seen)
    return report


def test_counts_do_not_depend_on_how_rows_come() -> None:
    rows = make_rows("binary", 30) + make_rows("binary", 10) + [{**row, "label": not row["label"]} for row in
                                                               make_rows("binary", 5)]  # fmt: skip
    whole = report_of(rows, "binary")
    apart = report_of(rows, "binary", parts=7)
    assert (whole.suspected, whole.first) == (apart.suspected, apart.first)
    assert whole.suspected["repeated"] + whole.suspected["contradicted"] == 15
    assert whole.inspected == 45 and whole.first["repeated"] == 31


def test_rows_repeated_on_purpose_are_no_suspicion() -> None:
    report = report_of(ANSWERS * 2, "prompt_completion")
    assert shares(report)["repeated"] == (8, 16) and "repeated" not in shares(report, repeats=8)
    assert not judged(report, {}, "rows", repeats=8) and judged(report, {}, "rows")


def test_a_limit_of_one_lets_all_pass_and_one_of_zero_none() -> None:
    report = report_of([{**row, "completion": ""} for row in ANSWERS], "prompt_completion")
    assert any("empty completion" in line for line in judged(report, {"empty": 1}, "rows"))
    few = report_of([*ANSWERS, {"prompt": "p", "completion": ""}], "prompt_completion")
    with pytest.raises(UserError, match="1 of 9 rows"):
        judged(few, {"empty": 0.0}, "rows")


def test_the_readme_names_every_suspicion_with_its_limit() -> None:
    table = (ROOT / "README.md").read_text()
    for name, suspicion in SUSPICIONS.items():
        limit = "never" if suspicion.limit == 1 else f"{suspicion.limit:.0%}".replace("%", " %")
        assert re.search(rf"\| `{name}` \| .* \| {limit}", table), name


def test_every_suspicion_can_be_raised() -> None:
    """A name that no code counts would be a limit that nothing keeps."""
    pair = {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "user", "content": "a"}]}
    report = report_of([{**pair, "rejected": pair["chosen"]}, {**pair, "rejected": []}], "preference")
    report.suspect("unrendered")
    report.suspect("forgotten")
    report.unended = report.cut_completions = 1
    report.drop("for a reason")
    other = report_of([*PAIRS[:1] * 2, {**PAIRS[0], "chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]}],
                      "preference")  # fmt: skip
    assert {*shares(report), *shares(other)} == set(SUSPICIONS)
