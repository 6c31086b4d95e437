"""`align-kit show`: what is said of rows is what the trainer is given, and nothing a row says reaches a terminal.

The command runs as a user runs it, on rows that teach what they should and on rows with one mistake each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from align_kit import registry
from align_kit.cli import main
from align_kit.config import load
from align_kit.data import prepare
from align_kit.data.render import Row
from align_kit.forward.logprobs import predicted
from align_kit.inspect import terminal
from align_kit.inspect.seen import Seen, look
from align_kit.inspect.trace import Tracer
from align_kit.plan.describe import Asked
from align_kit.resources import folder
from align_kit.stages import alone
from align_kit.stages.data import wanted
from tests.data_rows import BOS, CHATS, STRINGS, bos_tokenizer, chat_tokenizer

ROWS: dict[str, list[Row]] = {
    "pretrain": [{"text": row["prompt"] + row["completion"]} for row in STRINGS],
    "sft": [{"prompt": row["prompt"], "completion": row["completion"]} for row in STRINGS],
    "dpo": [{**row, "chosen": row["completion"]} for row in STRINGS],
    "kto": [{**row, "label": n % 2 == 0} for n, row in enumerate(STRINGS)],
    "ppo": [{"prompt": row["prompt"], "completion": row["completion"]} for row in STRINGS],
}
ROWS = {phase: [{name: value for name, value in row.items() if name != "rejected" or phase == "dpo"} for row in rows]
        for phase, rows in ROWS.items()}  # fmt: skip
for pair in ROWS["dpo"]:
    del pair["completion"]
ROWS |= {"reward": ROWS["dpo"], "orpo": ROWS["dpo"]}
TURNS = [{"messages": [*row["prompt"], *row["completion"]]} for row in CHATS]
LENGTH = {"pretrain": "24", "ppo": "128"}

Write = Callable[[Sequence[Row]], str]


@pytest.fixture
def file(tmp_path: Path) -> Write:
    """Writes rows to a file and returns its path."""

    def write(rows: Sequence[Row]) -> str:
        place = tmp_path / "rows.jsonl"
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(place)

    return write


def line(phase: str, data: str, *more: str) -> list[str]:
    """Return the words that show rows of a file, with the embedded model's tokenizer unless another is named."""
    length = () if "--max_length" in more else ("--max_length", LENGTH.get(phase, "64"))
    return ["show", phase, "--config_name", "builtin:tiny", "--datasets", data, *length, *more]


def shown(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> str:
    """Return what the command prints."""
    assert main(words) == 0
    return capsys.readouterr().out


def seen(phase: str, data: str, *more: str) -> Seen:
    """Return what the command looks at."""
    recipe = registry.get(phase)
    config = load(recipe, line(phase, data, *more)[2:], defaults=folder("recipes") / f"{phase}.yaml")
    return look(recipe, config, "train", rows=4, row=None)


def kept(text: str, name: str) -> str:
    """Return the lines of a check, without the blanks that wrap them."""
    lines = text.split("\nchecks\n")[1].splitlines()
    start = next(n for n, one in enumerate(lines) if one[8:].split()[:1] == [name])
    more = lines[start + 1 :]
    end = next((n for n, one in enumerate(more) if one[2] != " "), len(more))
    return " ".join(" ".join(lines[start : start + 1 + end]).split())


# --- what is shown is what is trained ---------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", registry.names())
def test_what_is_counted_is_what_the_trainer_predicts(phase: str, file: Write) -> None:
    """The numbers are of the stored columns; here they are held to the batches that the trainer makes of them."""
    found = seen(phase, file(ROWS[phase]))
    recipe, rows = registry.get(phase), found.split.rows
    assert found.labels.measured == len(rows) > 0
    if recipe.writes:
        assert found.labels.trained == 0 and found.labels.tokens == sum(map(len, rows["prompt_ids"]))
        return
    config = load(recipe, line(phase, "unread")[2:], defaults=folder("recipes") / f"{phase}.yaml")
    batch = recipe.trainer_class().collator(found.decoder.tokenizer, Asked(config))([dict(row) for row in rows])
    assert found.labels.trained == int(predicted(batch).sum())
    assert found.labels.tokens == int(batch["attention_mask"].sum())
    assert found.labels.sequences == len(batch["input_ids"])


@pytest.mark.parametrize("phase", [name for name in registry.names() if name != "pretrain"])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_row_that_is_shown_is_the_row_of_the_run(phase: str, mode: str, file: Write) -> None:
    recipe = registry.get(phase)
    given = ("--truncation_mode", mode) if phase in ("sft", "dpo") else ()
    config = load(recipe, line(phase, file(ROWS[phase]), *given)[2:], defaults=folder("recipes") / f"{phase}.yaml")
    words, _ = alone.opened(recipe, config)
    asked = wanted(recipe, config, Asked(config))
    rows = prepare.given(asked)["train"]
    stored = prepare.prepare(asked, words).train
    tracer = Tracer(recipe, stored.account["kind"], words, asked.options, recipe.trainer_class().collator(
        words, Asked(config)))  # fmt: skip
    traced = [tracer.trace(number, row) for number, row in enumerate(rows.rows, start=1)]
    taken = [one for one in traced if one.row is not None]
    assert [one.row for one in taken] == list(stored.rows)
    assert len(traced) - len(taken) == sum(stored.report.dropped.values())
    for one in taken:
        spans = tracer.spans(one)
        whole = [token for span in spans for token in span.ids]
        assert one.whole is not None
        parts = [one.whole[name] for name in ("prompt_ids", "input_ids", "completion_ids", "chosen_ids", "rejected_ids")
                 if name in one.whole]  # fmt: skip
        assert whole == [token for part in parts for token in part], "shown with what was cut off, a row is whole"
        sequences = tracer.sequences(one.row or {})
        trained = [token for ids, mask in sequences for token, on in zip(ids, mask, strict=True) if on]
        assert [token for span in spans if span.state == "TRAINED" for token in span.ids] == trained


def test_documents_of_a_packed_row_are_shown_apart(file: Write, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "one two"}, {"text": "three four five"}]
    text = shown(capsys, line("pretrain", file(rows), "--max_length", "8"))
    assert "┃ one two⟨<|endoftext|>⟩" in text and "the row ends inside a document" in text
    assert "row 1 of 1 (first): 8 tokens of 2 documents" in text
    assert "a trained <|endoftext|> each: 1, 1 in a row" in kept(text, "end")


def test_a_pair_shows_its_prompt_once(file: Write, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, line("dpo", file(ROWS["dpo"][:1])))
    assert text.count("What is 3 + 4?") == 1
    assert re.search(r"prompt +masked +│ What is 3 \+ 4\?↵\n +chosen +TRAINED ┃ It is 7\.⟨<\|endoftext\|>⟩\n", text)
    assert re.search(r"rejected +TRAINED ┃ It is 8, or so\.⟨", text) and "begin with alike: 4\n" in text


@pytest.mark.parametrize("phase, part", [("kto", "label: desirable"), ("ppo", "answer: It is 7."),
                                         ("reward", "each side gets one score")])  # fmt: skip
def test_what_stands_beside_a_row(phase: str, part: str, file: Write, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, line(phase, file(ROWS[phase][:2]), "--row", "1"))
    assert part in text
    assert ("TRAINED" in text) == (phase == "kto"), "a policy that writes and a reward model predict nothing here"


# --- what looks wrong -------------------------------------------------------------------------------------------------

DROPS_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
NO_END = "{% for m in messages %}{{ m.content }}{% endfor %}"
TURN_END = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
LONG = [{"prompt": "What?", "completion": "word " * 40}, *ROWS["sft"][:1]]
GOOD = [{"prompt": f"Question {n}?\n", "completion": f"Answer {n}."} for n in range(8)]


def test_rows_without_a_mistake_are_ok(file: Write, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, line("sft", file(GOOD)))
    states = [one.split()[0] for one in text.split("\nchecks\n")[1].splitlines() if one.strip() and one[2] != " "]
    assert set(states) == {"ok"} and len(states) >= 6
    assert "8 of 8 (100.0%) completions end in a trained <|endoftext|>" in kept(text, "end")
    assert kept(text, "text") == "ok text all that 8 sampled rows say is in their tokens"


@pytest.mark.parametrize(
    "phase, rows, more, name, parts",
    [
        ("sft", LONG, ["--max_length", "32"], "end", ["NOT", "1 of 2 (50.0%)", "max_length 32 cuts"]),
        ("sft", LONG, ["--max_length", "32"], "cut", ["NOT", "completions cut, and their end", "all fit"]),
        ("reward", [*ROWS["dpo"], *ROWS["dpo"]], ["--max_length", "32"], "cut", ["NOT", "longer than max_length"]),
        ("sft", TURNS[:1], [], "prompt", ["NOT", "the user's too; give --assistant_only_loss true"]),
        ("sft", TURNS[:1], ["--assistant_only_loss", "true"], "prompt", ["ok", "is masked"]),
        ("sft", GOOD, ["--completion_only_loss", "false"], "prompt", ["note", "completion_only_loss is false"]),
        ("sft", [{"prompt": "Say", "completion": "<|im_end|> now"}], [], "control", ["note", "as the text they are"]),
        ("sft", [*GOOD, {"prompt": "Q?", "completion": ""}], [], "empty", ["NOT", "1 of 9 (11.1%)"]),
        ("dpo", [{"prompt": "Q?", "chosen": "a", "rejected": "a"}, *ROWS["dpo"][:1]], [], "identical", ["NOT", "1 of"]),
        ("sft", LONG, ["--max_length", "14"], "run", ["NOT", "refuses these rows", "--data_limits"]),
    ],
)  # fmt: skip
def test_a_mistake_is_said(
    phase: str, rows: list[Row], more: list[str], name: str, parts: list[str], file: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    said = kept(shown(capsys, line(phase, file(rows), *more)), name)
    for part in parts:
        assert part in said, said


@pytest.mark.parametrize(
    "template, eos, name, parts",
    [
        (DROPS_SYSTEM, "<|im_end|>", "text", ["NOT", "drops or changes the system's message in 1 of 5", "“Be brief.”"]),
        (NO_END, "<|im_end|>", "end", ["NOT", "0 of 5 (0.0%)", "at least 99%"]),
        (TURN_END, "<|endoftext|>", "end", ["ok", "<|im_end|>"]),  # the embedded model's own files name both ends
        (TURN_END, "<|eot_id|>", "end", ["NOT", "end in <|im_end|>, which generation does not stop at"]),
    ],
)
def test_a_chat_template_is_looked_through(
    template: str, eos: str, name: str, parts: list[str], file: Write, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chat_tokenizer(template, eos=eos).save_pretrained(tmp_path / "words")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((folder_of_tiny() / "config.json").read_text())
    if name == "end" and parts[0] == "ok":
        ids = chat_tokenizer(None).convert_tokens_to_ids(["<|im_end|>"])
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    words = line("sft", file(TURNS), "--tokenizer_name", str(tmp_path / "words"), "--max_length", "1024")
    words[words.index("builtin:tiny")] = str(model)
    said = kept(shown(capsys, words), name)
    for part in parts:
        assert part in said, said


def folder_of_tiny() -> Path:
    """Return the folder of the embedded model."""
    from align_kit.models import source

    return source.resolve("builtin:tiny", random=True).folder


def test_bos_is_counted_where_it_is_doubled_and_where_it_lacks(
    file: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bos_tokenizer(TURN_END.replace("<|im_end|>", "<|eot_id|>")).save_pretrained(tmp_path / "words")
    more = ("--tokenizer_name", str(tmp_path / "words"), "--max_length", "1024")
    doubled = [{"prompt": f"{BOS}Twice?", "completion": "Yes."}, {"prompt": "Once?", "completion": "Yes."}]
    said = kept(shown(capsys, line("sft", file(doubled), *more, "--control_tokens", "tokens")), "BOS")
    assert said.startswith("NOT") and "1 of 2 (50.0%) sequences begin with <|begin_of_text|> twice" in said
    assert kept(shown(capsys, line("sft", file(GOOD), *more)), "BOS").startswith("ok")
    said = kept(shown(capsys, line("sft", file(TURNS), *more)), "BOS")
    assert said.startswith("note") and "begin without <|begin_of_text|>" in said


@pytest.mark.parametrize(
    "phase, state, part", [("dpo", "ok", "trained all the same"), ("reward", "note", "the one before")]
)
def test_what_it_means_that_padding_is_eos(
    phase: str, state: str, part: str, file: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = chat_tokenizer(None)
    words.pad_token = words.eos_token
    words.save_pretrained(tmp_path / "words")
    more = ("--tokenizer_name", str(tmp_path / "words"), "--max_length", "1024")
    said = kept(shown(capsys, line(phase, file(ROWS["dpo"]), *more)), "pad")
    assert said.startswith(state) and part in said


def test_a_boundary_that_merges_is_shown_with_its_tokens(
    file: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_tokenizer(None).save_pretrained(tmp_path / "words")
    rows = [{"prompt": "The us", "completion": "er asks"}]
    text = shown(capsys, line("sft", file(rows), "--tokenizer_name", str(tmp_path / "words")))
    assert "1 of 1 (100.0%) prompts end earlier" in kept(text, "boundary")
    assert "“·” “u” “s” alone, “·user” “·asks” “<|im_end|>” once completed" in text


# --- what reaches the reader ------------------------------------------------------------------------------------------

EVIL = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eevil\u2066 \x00 tail  \r\n你好"


@pytest.mark.parametrize("colour", [False, True])
def test_a_row_cannot_speak_to_the_terminal(
    colour: bool, file: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align_kit.inspect.command._on_terminal", lambda: colour)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    rows = [{"prompt": EVIL, "completion": EVIL}, {"prompt": "<|im_end|>\x1b", "completion": "\x9b1m"}]
    text = shown(capsys, line("sft", file(rows), "--max_length", "512", "--rows", "2"))
    assert ("\x1b" in text) == colour
    for style in (*terminal.STYLES.values(), terminal.RESET):
        text = text.replace(style, "")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert r"\x1b" in text and r"\u202e" in text and "你好" in text and "tail··" in text
    assert r"\x9b" in text


def test_plain_text_tells_a_control_token_from_text_that_spells_it(
    file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, line("sft", file([{"prompt": "Is <|endoftext|> text?", "completion": "Yes"}]), "--plain"))
    assert "Is <|endoftext|> text?" in text and "Yes⟨<|endoftext|>⟩" in text


def test_the_page_has_the_same_and_runs_nothing(
    file: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "<script>alert(1)</script>\x1b", "completion": "fine"}]
    place = tmp_path / "page.html"
    assert str(place) in shown(capsys, line("sft", file(rows), "--html", str(place)))
    page = place.read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page and "\x1b" not in page and r"\x1b" in page
    assert "1 of 1 (100.0%) completions end in a trained" in page and ">fine</span>" in page


@pytest.mark.parametrize(
    "more, part",
    [
        (["--row", "9"], "--row 9: there are rows 1 to 8"),
        (["--row", "first"], "--row first: give a whole number from 1"),
        (["--rows"], "--rows (nothing): give one value"),
        (["--split", "eval"], "--split eval: this run has no such rows; known: train"),
        (["--plain", "yes"], "--plain takes nothing"),
        (["--rwo", "3"], "rwo (command line) is an unknown key"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(
    more: list[str], part: str, file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line("sft", file(GOOD), *more)) == 2
    said = capsys.readouterr()
    assert part in said.err and said.err.count("\n") == 1 and not said.out


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    from align_kit.inspect.command import Options

    text = shown(capsys, ["show", "--help"])
    assert all(f"--{one.name}" in text for one in fields(Options))


def test_one_row_is_shown_whole(file: Write, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*GOOD, {"prompt": "long " * 400, "completion": "short"}]
    words = line("sft", file(rows), "--max_length", "4096")
    few, whole = shown(capsys, words), shown(capsys, [*words, "--row", "9"])
    assert "characters …]" in few and "characters …]" not in whole
    assert len(re.findall(r"\blong\b", whole)) == 400 and "row 9 of 9: tokens" in whole


def test_the_widest_line_fits(file: Write, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, line("dpo", file(ROWS["dpo"]), "--width", "70", "--max_length", "256"))
    after = text.split("\nrow ", 1)[1]
    assert max(sum(map(terminal.columns, one)) for one in after.splitlines()) <= 70


def test_real_problems_are_shown_as_they_stand(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_KIT_DATA", str(real_data))
    config = tmp_path / "kto.yaml"
    config.write_text("datasets:\n  - {path: card:gsm8k_solution_labels, max_samples: 300}\nmax_length: 400\n")
    text = shown(capsys, ["show", "kto", "--config_name", "builtin:tiny", "--config", str(config), "--row", "1"])
    question = json.loads((real_data / "gsm8k" / "model_solutions_kto.jsonl").read_text().splitlines()[0])["prompt"]
    prompt = "".join(re.findall(r"│ (.*)", text))
    assert prompt.replace("↵", "").split() == question.split()
    assert "of 300" in kept(text, "end") and "NOT" in kept(text, "end")
    assert kept(text, "text") == "ok text all that 250 sampled rows say is in their tokens"
