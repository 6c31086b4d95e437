"""`align-kit sample` on real models: what is drawn, by whom, what is left when it is stopped, and what it writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from align_kit import cards, machine
from align_kit.data.load import load
from align_kit.errors import UserError
from align_kit.sampling.command import sample
from tests.harness import Ranks
from tests.small import WORDS, write_model, write_scorer

LONG = "150"  # tokens, of which most completions of random weights end before
STEADY = ["--samples", "4", "--batch-size", "4", "--max-new-tokens", "30", "--keep", "all"]  # a batch for each prompt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of many lengths, with an answer each."""
    place = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": " ".join(WORDS[: 1 + n % 9]) + f" {n}", "answer": str(n)} for n in range(24)]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def lines(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]


def drawn(output: Path, model: Path, asked: Path, *words: str) -> list[dict[str, Any]]:
    """Return all completions of a command that keeps what ends."""
    common = [str(model), str(asked), "--output", str(output), "--max-new-tokens", "60", "--keep", "all"]
    assert sample([*common, *words]) == 0
    assert not Path(f"{output}.drawn").exists()
    return lines(output / "completions.jsonl")


def test_a_completion_depends_on_seed_prompt_and_model_alone(model: Path, asked: Path, tmp_path: Path) -> None:
    whole = drawn(tmp_path / "a", model, asked, "--workers", "1", "--samples", "3")
    texts = [one["text"] for row in whole for one in row["completions"]]
    assert len(texts) == 72 and len(set(texts)) > 65
    assert {one["ended"] for row in whole for one in row["completions"]} == {True, False}
    # however many at a time, in however many processes, and whatever stands beside it
    assert drawn(tmp_path / "b", model, asked, "--workers", "2", "--samples", "3", "--batch-size", "25") == whole
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(reversed(asked.read_text().splitlines(keepends=True)[4:])))
    assert drawn(tmp_path / "c", model, backwards, "--samples", "2", "--workers", "1") == [
        {**row, "completions": row["completions"][:2]} for row in reversed(whole[4:])
    ]
    other = drawn(tmp_path / "d", model, asked, "--workers", "1", "--samples", "1", "--seed", "1")
    assert [row["completions"][0]["text"] for row in other] != [row["completions"][0]["text"] for row in whole]


@pytest.mark.slow
def test_workers_with_threads_of_their_own(
    model: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this process has computed with several threads, a fork of it that does so too would wait for ever."""
    import torch

    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        words = ["--samples", "3", "--batch-size", "25"]
        alone, shared_out = (drawn(tmp_path / n, model, asked, "--workers", n, *words) for n in "12")
    finally:
        torch.set_num_threads(before)
    assert shared_out == alone


def test_the_likeliest_token_is_what_transformers_takes(model: Path, asked: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from align_kit.models.completion import Drawing
    from align_kit.models.generate import draw, open_model

    stock, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def greedy(prompt: str) -> str:
        ids_BT = torch.tensor([tokenizer(prompt).input_ids])
        mask_BT = ids_BT.new_ones(ids_BT.shape)
        written_BT = stock.generate(ids_BT, attention_mask=mask_BT, do_sample=False, max_new_tokens=20)
        return str(tokenizer.decode(written_BT[0, ids_BT.shape[1] :]))

    rows = lines(asked)[:6]
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
    mine, words = open_model(model)
    for how in (Drawing(length=20), Drawing(length=20, temperature=1.0, top_k=1)):
        found = draw(mine, words, prompts, how, range(6))
        assert [one.text for (one,) in found] == [greedy(row["prompt"]) for row in rows]


def test_what_a_model_brings_for_chatting_is_left_aside(model: Path, asked: Path) -> None:
    from transformers import GenerationConfig

    from align_kit.models.completion import Drawing
    from align_kit.models.generate import draw, open_model

    mine, words = open_model(model)
    prompts = [words(row["prompt"]).input_ids for row in lines(asked)[:6]]
    how = Drawing(samples=2, temperature=1.0, length=20)
    plain = draw(mine, words, prompts, how, range(6))
    brought = GenerationConfig(
        eos_token_id=[0, 3], pad_token_id=1, repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=18,
        temperature=0.01, top_k=1, do_sample=True,
    )  # fmt: skip
    mine.generation_config = brought
    assert draw(mine, words, prompts, how, range(6)) == plain
    assert mine.generation_config is brought


def test_a_space_that_decoding_drops_is_part_of_the_completion() -> None:
    """Tokenizers in SentencePiece's manner write a space before a word and drop the first one they decode."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from align_kit.models.completion import Completion
    from align_kit.models.generate import _read

    known = {"</s>": 0, "\u2581It": 1, "\u2581is": 2, "\u25814": 3, "2": 4}
    words = Tokenizer(models.WordLevel(known, unk_token="</s>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    prompt = tokenizer("It is").input_ids
    assert tokenizer.decode([3, 4]) == "42" and prompt == [1, 2]
    assert _read(tokenizer, prompt, [3, 4, 0, 0], [0], True) == Completion(" 42", 3, True, False)
    assert _read(tokenizer, prompt, [3, 4], [0], False) == Completion(" 42", 2, False, False)


def test_nothing_outside_the_nucleus_is_drawn(model: Path, asked: Path, tmp_path: Path) -> None:
    import torch

    from align_kit.models.completion import Drawing
    from align_kit.models.generate import draw, open_model

    stock, tokenizer = open_model(model)
    prompt = tokenizer(WORDS[0]).input_ids
    how = Drawing(samples=200, temperature=1.5, top_p=0.4, length=1)
    found = {one.text for one in draw(stock, tokenizer, [prompt], how, [0])[0] if not one.ended}
    with torch.no_grad():
        mass_V = (stock(torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1)
    order = mass_V.argsort(descending=True)
    nucleus = order[: int((mass_V[order].cumsum(0) < 0.4).sum()) + 1].tolist()
    allowed = {tokenizer.decode([*prompt, token]).removeprefix(tokenizer.decode(prompt)) for token in nucleus}
    assert len(nucleus) > 5 and found <= allowed and len(found) > len(allowed) / 2


def length(prompts: Sequence[str], completions: Sequence[str], **others: Any) -> list[float]:
    """A reward function: the characters of a completion."""
    return [float(len(text)) for text in completions]


def is_even(prompt: str, completion: str, answer: str) -> bool:
    """A checker: whether the completion has an even number of characters."""
    assert prompt.split()[-1] == answer
    return len(completion) % 2 == 0


def nothing(prompt: str, completion: str, answer: str) -> None:
    """A checker that forgets to say what it found."""


def short(completions: Sequence[str], **others: Any) -> list[float]:
    """A reward function that forgets all completions but one."""
    return [1.0]


def marked(completions: Sequence[str], **others: Any) -> list[float]:
    """A reward function that not every text can be given to."""
    return [float(text.split("####")[1]) for text in completions]


def picky(completions: Sequence[str], **others: Any) -> list[float]:
    """A reward function that fails on what it was not tried on."""
    assert set(completions) == {"Yes.", "0"}
    return [1.0, 2.0]


def test_a_checker_of_ones_own_and_a_card_that_says_how(model: Path, asked: Path, tmp_path: Path) -> None:
    words = [str(model), str(asked), "--samples", "3", "--max-new-tokens", LONG, "--workers", "1"]
    sample([*words, "--checker", "tests.test_sampling:is_even", "--output", str(tmp_path / "pairs")])
    rows = lines(tmp_path / "pairs/train.jsonl")
    assert rows and all(len(row["chosen"]) % 2 == 0 and len(row["rejected"]) % 2 == 1 for row in rows)
    block = cards.load_card(tmp_path / "pairs/pairs.md").block
    made, told = block.made, block.made.model_extra
    assert made.seed == 0 and made.sources[0].file == "prompts.jsonl" and made.sources[0].rows == 24
    assert told["teacher"] == "teacher" and len(told["model_digest"]) == 32 and told["samples"] == 3
    assert told["judge"] == "tests.test_sampling:is_even" and told["at_least"] == 1
    completions = lines(tmp_path / "pairs/completions.jsonl")
    cut = sum(not one["ended"] for row in completions for one in row["completions"])
    assert {step.name: step.dropped for step in block.filters}["cut off"] == cut > 0
    assert load([{"path": str(tmp_path / "pairs/pairs.md")}], phase="dpo").kind == "preference"
    # the same completions once more, chosen otherwise: nothing is drawn
    sample(["--from", str(tmp_path / "pairs"), "--reward-funcs", "tests.test_sampling:length", "--keep", "best",
            "--output", str(tmp_path / "best")])  # fmt: skip
    for row in lines(tmp_path / "best/train.jsonl"):
        (all_of_them,) = [one["completions"] for one in completions if one["prompt"] == row["prompt"]]
        able = [one["text"] for one in all_of_them if one["ended"] and not one["control"] and one["text"].strip()]
        assert row["completion"] == max(able, key=len) and row["score"] == len(row["completion"])
    assert cards.load_card(tmp_path / "best/best.md").block.made.model_extra["teacher"] == "teacher"


def test_a_reward_model_judges(model: Path, asked: Path, tmp_path: Path) -> None:
    from align_kit.preferences.scoring import Scorer

    scorer = write_scorer(tmp_path / "scorer")
    sample([str(model), str(asked), "--samples", "3", "--max-new-tokens", LONG, "--workers", "1", "--margin", "0.1",
            "--reward-model", str(scorer), "--output", str(tmp_path / "pairs")])  # fmt: skip
    rows = lines(tmp_path / "pairs/train.jsonl")
    again = list(Scorer(str(scorer)).scores(rows, ["chosen", "rejected"]))
    told = [(row["score_chosen"], row["score_rejected"]) for row in rows]
    assert rows and all(chosen > rejected + 0.1 for chosen, rejected in told)
    assert again == [pytest.approx(one, abs=1e-5) for one in told]
    made = cards.load_card(tmp_path / "pairs/pairs.md").block.made.model_extra
    assert made["judge"] == "scorer" and made["judge_digest"] == Scorer(str(scorer)).digest


def command(env: dict[str, str], *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "align_kit", "sample", *words],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(model: Path, asked: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a command draws that nobody stops."""
    place = tmp_path_factory.mktemp("whole") / "made"
    assert sample([str(model), str(asked), *STEADY, "--workers", "1", "--output", str(place)]) == 0
    return lines(place / "completions.jsonl")


STOPS = {
    "killed": (lambda pid, worker: os.kill(pid, signal.SIGKILL), -signal.SIGKILL, ""),
    "asked to end": (lambda pid, worker: os.kill(pid, signal.SIGTERM), 130, "what was drawn is kept in"),
    "a worker killed": (lambda pid, worker: os.kill(worker, signal.SIGKILL), 2, "a worker was killed, for lack of mem"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", STOPS)
def test_what_was_drawn_survives_a_stop(
    how: str, model: Path, asked: Path, whole: list[dict[str, Any]], tmp_path: Path, ranks: Ranks,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Two workers, and an end before theirs; the same command goes on, and gives what one piece gives."""
    stop, code, message = STOPS[how]
    words = [str(model), str(asked), *STEADY, "--workers", "2", "--output", str(tmp_path / "cut")]
    place = tmp_path / "cut.drawn/completions.jsonl"
    running = command(ranks.env, *words)
    while not (place.exists() and place.read_bytes().count(b"\n") >= 2):
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    stop(running.pid, int(workers[0]))
    said = running.communicate(timeout=60)[1]
    assert running.returncode == code and message in said and "Traceback" not in said, said
    wait_for_end(workers)
    done = place.read_bytes().count(b"\n")
    assert 2 <= done < 24 and not (tmp_path / "cut").exists()
    capsys.readouterr()
    assert sample([*words, "--workers", "1"]) == 0
    assert f"{done} prompts are answered already" in capsys.readouterr().out
    assert lines(tmp_path / "cut/completions.jsonl") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def wait_for_end(workers: Sequence[str]) -> None:
    """Wait until processes that lost their parent have ended, and fail where one goes on."""
    assert workers
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and _runs(pid) for pid in workers):
        assert time.monotonic() < until, f"one of {workers} goes on"
        time.sleep(0.02)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_mistake_costs_one_line_and_nothing_is_drawn(model: Path, asked: Path, tmp_path: Path) -> None:
    scorer = write_scorer(tmp_path / "scorer")
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "amber"}\n')
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    table = [
        ([model, asked], "nothing says which completions are good: give --checker"),
        ([model, asked, "--checker", "nowhere:f"], "--checker: 'nowhere:f' cannot be imported"),
        ([model, asked, "--checker", "tests.test_sampling:nothing"], "tests.test_sampling:nothing gave None; it must"),
        ([model, asked, "--keep", "all", "--prompt-template", "x"], "prompt_template 'x' must be 'chat' or a text"),
        ([model, asked, "--checker", "tests.test_sampling:none"], "tests.test_sampling has no function 'none'"),
        ([model, bare, "--checker", "tests.test_sampling:is_even"], "prompt 1 has no answer to check against"),
        ([model, asked, "--reward-model", model], "is no sequence classifier"),
        ([model, asked, "--keep", "rejection", "--reward-funcs", "tests.test_sampling:length"], "needs --at-least"),
        ([model, asked, "--reward-funcs", "tests.test_sampling:short"], "short gave 1 numbers for 2 completions"),
        ([model, asked, "--reward-funcs", "tests.test_sampling:is_even"], "is_even cannot be called .*'prompt'"),
        ([model, asked, "--reward-funcs", "tests.test_sampling:marked"],
         r"function tests.test_sampling:marked failed in .*, line \d+ of .*test_sampling.py \(IndexError: .* tried on"),
        ([tmp_path / "none", asked, "--keep", "all"], "the model '.*none': no such folder"),
        ([scorer, asked, "--keep", "all"], "scorer gives scores, not words"),
        ([model, asked, "--keep", "all", "--max-new-tokens", "256"], "no room for any prompt"),
        ([model, tmp_path / "gone.jsonl", "--keep", "all"], "gone.jsonl"),
        ([model, asked, "--keep", "all", "--reason", "x"], "reason_template 'x'"),
        ([model, asked, "--keep", "all", "--name", "my set"], "cannot name a card 'my set'"),
        ([model, asked, "--keep", "majority", "--answer-of", "tests.test_sampling:none"], "no function 'none'"),
        (["--from", full, "--samples", "9", "--top_k", "0", "--seed", "3"],
         "draws nothing, so nothing can follow --samples, --top-k, --seed; leave that out"),
        (["--from", full, "--prompt-template", "chat"], "nothing can follow --prompt-template; leave"),
        (["--from", full, "--trust-remote-code"], "nothing can follow --trust-remote-code; leave"),
        (["--from", full], "no drawn.json and completions.jsonl there"),
    ]
    for words, message in table:
        with pytest.raises(UserError, match=message):
            sample([*map(str, words), "--output", str(tmp_path / "out"), *words_of(words)])
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.drawn").exists(), message
    with pytest.raises(UserError, match="is not empty"):
        sample([str(model), str(asked), "--keep", "all", "--output", str(full)])


def words_of(words: list[Any]) -> list[str]:
    """Return what every command of the table says unless it says it itself."""
    draws = ["--samples", "2"] + ([] if "--max-new-tokens" in words else ["--max-new-tokens", "20"])
    return [] if "--from" in words else draws


def test_completions_that_nothing_is_kept_of_can_be_chosen_from_again(
    model: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(model), str(asked), "--samples", "2", "--max-new-tokens", LONG, "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="nothing is left to write; what was drawn is kept"):
        sample([*words, "--keep", "majority"])
    assert "no majority" in capsys.readouterr().out
    sample([*words, "--keep", "all", "--max-prompts", "4"])
    said = capsys.readouterr().out
    assert "4 prompts are answered already" in said and "holds completions of 20 other prompts still" in said
    sample([*words, "--keep", "all", "--overwrite"])
    assert "24 prompts are answered already" in capsys.readouterr().out
    assert not (tmp_path / "out.drawn").exists()


def test_a_function_that_fails_on_what_was_drawn_is_one_line_and_keeps_it(
    model: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(model), str(asked), "--max-prompts", "3", "--max-new-tokens", LONG, "--samples", "2", "--workers", "1"]
    words += ["--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="test_sampling:picky failed in picky, .* what was drawn is kept$") as said:
        sample([*words, "--reward-funcs", "tests.test_sampling:picky"])
    assert "\n" not in str(said.value)
    capsys.readouterr()
    sample([*words, "--reward-funcs", "tests.test_sampling:length", "--keep", "best"])
    assert "3 prompts are answered already" in capsys.readouterr().out


def test_choosing_anew_keeps_the_counts_and_what_others_draw(model: Path, asked: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": " ".join(WORDS * 40)}) + "\n")
    words = [str(model), str(asked), str(asked), str(long), "--samples", "2", "--max-new-tokens", LONG, "--keep", "all"]
    sample([*words, "--output", str(tmp_path / "first")])
    others = tmp_path / "second.drawn"  # of a command that was stopped and is to go on
    others.mkdir()
    (others / "completions.jsonl").write_text("[1, []]\n")
    sample(["--from", str(tmp_path / "first"), "--keep", "all", "--output", str(tmp_path / "second")])
    assert (others / "completions.jsonl").read_text() == "[1, []]\n"
    first, second = (cards.load_card(tmp_path / name / f"{name}.md").block for name in ("first", "second"))
    counts = {step.name: step.dropped for step in first.filters}
    assert counts == {step.name: step.dropped for step in second.filters}
    assert counts["repeated prompts"] == 24 and counts["prompts without room"] == 1
    assert (first.made.model_extra["prompts"], first.made.model_extra["completions"]) == (24, 48)
