"""Which completions are kept: pure functions, as tables and properties; and what of each prompt is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_kit.data.checkers import number_of
from align_kit.errors import UserError
from align_kit.models.completion import Completion
from align_kit.sampling import journal, judging, keep, options, prompts
from align_kit.sampling.choosing import Chooser
from align_kit.sampling.keep import Candidate

CANDIDATES = st.lists(st.builds(Candidate, st.text("ab", max_size=3), st.integers(0, 4).map(float)), max_size=8)


def some(*scores: float) -> list[Candidate]:
    return [Candidate(f"{place}", score) for place, score in enumerate(scores)]


def texts(candidates: list[Candidate]) -> list[str]:
    return [one.text for one in candidates]


def test_the_best_are_kept_in_the_order_drawn() -> None:
    assert texts(keep.good(some(1, 4, 0, 4), None, 2)) == ["1", "3"]
    assert texts(keep.good(some(1, 4, 0, 4), 1, None)) == ["1", "3", "0"]
    assert keep.good(some(1, 0), 2, None) == []


def test_the_best_is_paired_with_the_worst() -> None:
    found = keep.pairs(some(1, 4, 0, 4, 3), None, 0, None)
    assert [(pair.chosen.text, pair.rejected.text) for pair in found] == [("1", "2"), ("3", "0")]
    assert keep.pairs(some(1, 4, 0, 4, 3), None, 0, 1) == found[:1]
    assert keep.pairs(some(1, 4, 0, 4, 3), None, 3, None) == found[:1]  # 4 is not more than 3 above 1
    assert keep.pairs(some(1, 1), None, 0, None) == keep.pairs(some(1, 0), 2, 0, None) == []


@given(CANDIDATES, st.none() | st.integers(0, 4), st.floats(0, 4), st.integers(1, 4))
def test_pairs_hold_what_they_promise(
    candidates: list[Candidate], at_least: int | None, margin: float, limit: int
) -> None:
    candidates = [Candidate(f"{place} {one.text}", one.score) for place, one in enumerate(candidates)]
    found = keep.pairs(candidates, at_least, margin, limit)
    assert len(found) <= limit
    used = [one for pair in found for one in pair]
    assert len(set(used)) == len(used)
    for chosen, rejected in found:
        assert chosen.score - rejected.score > margin and (at_least is None or chosen.score >= at_least)
    scores = [one.score for one in candidates]
    possible = scores and max(scores) - min(scores) > margin and (at_least is None or max(scores) >= at_least)
    assert bool(found) == bool(possible)
    if found:
        assert (found[0].chosen.score, found[0].rejected.score) == (max(scores), min(scores))


@pytest.mark.parametrize(
    ("answers", "agreement", "chosen"),
    [
        (["14", "14", "9", None], 0.5, "14"),
        (["14", "14", "9", None], 0.6, None),  # no answer is a vote against
        (["14", "9"], 0.5, None),  # a tie
        (["14", "14", "9", "9"], 0.5, None),
        ([None, None], 0.1, None),
        ([], 0.5, None),
        (["14"], 1.0, "14"),
    ],
)
def test_a_vote_needs_a_majority(answers: list[str | None], agreement: float, chosen: str | None) -> None:
    assert keep.vote(answers, agreement) == chosen


# --- one prompt after another ---------------------------------------------------------------------------------------

RIGHT, SLIP, WRONG = "12-8=4, 9-1-7=1\n#### 14", "12-8=4, 9-7=2\n#### 24", "#### 13"
ROW = {"prompt": "92-78?\n", "answer": "#### 14", "tools": None}


def said(text: str, *, ended: bool = True, control: bool = False) -> Completion:
    return Completion(text, len(text), ended, control)


def chooser(words: str, at_least: float | None = 2.0) -> Chooser:
    return Chooser(options.parse(["m", "p", "--output", "o", *words.split()]), at_least, number_of)


def chosen(words: str, *given: tuple[Completion, float | None], at_least: float | None = 2.0) -> Chooser:
    made = chooser(words, at_least)
    made.add(ROW, [one for one, _ in given], [score for _, score in given])
    return made


ALL = [(said(WRONG), 0.0), (said(RIGHT), 4.0), (said(SLIP), 1.0), (said(RIGHT + " "), 4.0)]


def test_what_each_way_of_keeping_writes() -> None:
    assert chosen("", *ALL).found.rows == [
        {"prompt": ROW["prompt"], "chosen": RIGHT, "rejected": WRONG, "score_chosen": 4.0, "score_rejected": 0.0}
    ]
    assert chosen("--keep rejection", *ALL).found.rows == [
        {"prompt": ROW["prompt"], "completion": RIGHT, "score": 4.0}
    ]
    labels = chosen("--keep rejection --write binary", *ALL).found
    assert [(row["completion"], row["label"]) for row in labels.rows] == [(WRONG, False), (RIGHT, True), (SLIP, False)]
    assert labels.completions == {"repeated": 1}
    both = [(row["completion"], "score" in row) for row in chosen("--keep all --per-prompt 2", *ALL).found.rows]
    assert both == [(WRONG, False), (RIGHT, False)]
    # the best of a prompt is kept however bad
    poor = chosen("--keep best", (said(WRONG), 0.0), (said(SLIP), 1.0)).found
    assert [row["completion"] for row in poor.rows] == [SLIP]


def test_the_majority_needs_no_score_and_is_held_to_the_answer() -> None:
    unscored = [(one, None) for one, _ in ALL]
    found = chosen("--keep majority", *unscored, at_least=None).found
    assert [row["completion"] for row in found.rows] == [RIGHT]
    assert (found.votes, found.right_votes, found.passed) == (1, 1, {2: 1})
    pair = chosen("--keep majority --write preference", *unscored, at_least=None).found.rows
    assert [(row["chosen"], row["rejected"]) for row in pair] == [(RIGHT, WRONG)]
    none = chosen("--keep majority --agreement 0.6", *unscored, at_least=None).found
    assert none.rows == [] and none.prompts == {"no majority": 1}
    # those that are left out have no say, and count against it
    cut = (said(RIGHT, ended=False), None)
    alone = (said(RIGHT), None)
    assert len(chosen("--keep majority", alone, cut, at_least=None).found.rows) == 1
    assert chosen("--keep majority", alone, cut, cut, at_least=None).found.prompts == {"no majority": 1}


def test_what_is_left_out_is_counted_by_reason() -> None:
    found = chosen(
        "--keep rejection",
        (said(RIGHT, ended=False), 4.0), (said(" \n"), 0.0), (said("<s>" + RIGHT, control=True), 4.0),
        (said(RIGHT), math.nan), (said(WRONG), 0.0), (said(WRONG), 0.0),
    ).found  # fmt: skip
    assert found.completions == {"cut off": 1, "empty": 1, "control tokens": 1, "without a score": 1, "repeated": 1}
    assert found.rows == [] and found.prompts == {"none is good": 1}
    assert (found.judged, found.good) == (2, 0)
    assert chosen("", (said(RIGHT), 4.0), (said(RIGHT), 4.0)).found.prompts == {"no pair": 1}
    assert chosen("", (said(""), 4.0)).found.prompts == {"no completion is left": 1}


def test_a_chain_of_thought_is_kept_apart() -> None:
    words = ["m", "p", "--output", "o", "--keep", "rejection", "--reason", r"{reasoning}\n#### {answer}"]
    made = Chooser(options.parse(words), 2.0, number_of)
    made.add(ROW, [said(RIGHT), said("#### 14")], [4.0, 2.0])
    assert made.found.rows == [{"prompt": ROW["prompt"], "reasoning": RIGHT[:-8], "answer": "14", "score": 4.0}]
    assert made.found.completions == {"without a chain of thought": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give a model and what it is to answer"),
        ("m p --from x", "--from takes completions that were drawn before"),
        ("m p --keep best-worst --write sft", "--keep best-worst writes preference, not sft"),
        ("m p --checker a:b --reward-model r", "--checker and --reward-model were given; one judges"),
        ("m p --keep all --checker a:b", "--checker is not used by --keep all"),
        ("m p --keep majority --at-least 1", "--at-least is not used by --keep majority"),
        ("m p --answer-of a:b", "--answer-of is for --keep majority"),
        ("m p --keep rejection --write binary --reason", "not binary labels"),
        ("m p --samples 1", "--samples 1 leaves nothing to choose from"),
        ("m p --temperature 0", "--temperature 0 gives one completion"),
        ("m p --samples 0", "0 does not fit; give a whole number, 1 or more"),
        ("m p --top-p 2", "2 does not fit; give a share"),
        ("m p --temperature nan", "nan does not fit"),
        ("m p --kep all", "unrecognized arguments: --kep"),
    ],
)
def test_a_mistake_is_one_line(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        options.parse([*words.split(), "--output", "o"])


# --- prompts and the journal ----------------------------------------------------------------------------------------


def written(place: Path, *rows: dict) -> str:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place)


def test_prompts_of_every_kind_of_row(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "hi"}
    files = {
        "prompt": {"prompt": "a", "answer": "1"},
        "sft": {"prompt": "b", "completion": "2"},
        "messages": {"messages": [turn, {"role": "assistant", "content": "yes"}]},
        "pairs": {"prompt": "c", "chosen": "x", "rejected": "y"},
    }
    named = [written(tmp_path / f"{name}.jsonl", row) for name, row in files.items()]
    found = prompts.read([*named, named[0]], None)
    read = [(row["prompt"], row.get("answer")) for row in found.rows]
    assert read == [("a", "1"), ("b", "2"), ([turn], "yes"), ("c", None)]
    assert found.repeated == 1 and found.checker is None
    assert [origin["file"] for origin in found.origins] == [Path(name).name for name in [*named, named[0]]]
    assert len(prompts.read(named, 2).rows) == 2
    with pytest.raises(UserError, match="text rows have no prompts"):
        prompts.read([written(tmp_path / "text.jsonl", {"text": "x"})], None)
    with pytest.raises(UserError, match="row 1: the conversation holds nothing but an answer"):
        prompts.read([written(tmp_path / "bare.jsonl", {"messages": files["messages"]["messages"][1:]})], None)


def test_an_answer_may_be_0_and_is_without_its_chain_of_thought(tmp_path: Path) -> None:
    nought = written(tmp_path / "0.jsonl", {"prompt": "1-1?", "answer": 0})
    trace = written(tmp_path / "t.jsonl", {"prompt": "1+1?", "reasoning": "one and one", "answer": "2"})
    assert [row["answer"] for row in prompts.read([nought, trace], None).rows] == [0, "2"]


def test_a_card_names_split_checker_and_licence() -> None:
    found = prompts.read(["card:sums_prompts[validation[:3]]"], None)
    assert len(found.rows) == 3 and found.checker == "align_kit.data.checkers:check"
    assert found.licences == ("apache-2.0",) and found.origins[0]["split"] == "validation[:3]"


def test_the_key_of_a_prompt_is_its_own() -> None:
    row = {"prompt": "a", "answer": "1"}
    assert prompts.key_of(row) == prompts.key_of({**row, "answer": "2", "tools": None})
    assert len({prompts.key_of(one) for one in (row, {"prompt": "b"}, {"prompt": "a", "tools": [{}]})}) == 3


def test_a_journal_goes_on_and_forgets_a_torn_line(tmp_path: Path) -> None:
    asked = {"seed": 1}
    with journal.opened(tmp_path / "j", asked) as first:
        first.add([1, 2], [[said("x")], [said("y")]])
        with (
            pytest.raises(UserError, match="another process draws into"),
            journal.opened(tmp_path / "j", asked),
        ):
            pass
    whole = (tmp_path / "j" / journal.DRAWN).read_bytes()
    for cut in (1, 5, len(whole.splitlines()[1])):
        (tmp_path / "j" / journal.DRAWN).write_bytes(whole[:-cut])
        with journal.opened(tmp_path / "j", asked) as again:
            assert again.found == {1: [said("x")]}
            again.add([2], [[said("y")]])
        assert (tmp_path / "j" / journal.DRAWN).read_bytes() == whole
    with pytest.raises(UserError, match="seed 1, and 2 is asked for"), journal.opened(tmp_path / "j", {"seed": 2}):
        pass
    journal.remove(tmp_path / "j")
    assert not (tmp_path / "j").exists()


def test_a_journal_nobody_can_read_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / journal.ASKED).write_text("{")
    with pytest.raises(UserError, match="cannot be read .*, so nobody knows"), journal.opened(tmp_path, {"seed": 1}):
        pass


def kept(folder: Path, text: str) -> None:
    """Leave in `folder` what a finished command leaves of one completion."""
    how = {"model": "m", "seed": 0, "from": [], "licences": [], "checker": None}
    (folder / journal.ASKED).write_text(json.dumps(how))
    lines = journal.completed_lines([{"prompt": text}], [[said(text)]], [[None]])
    (folder / journal.DRAWN).write_bytes(b"".join(lines))


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b\x0cc", "a\r\nb", "\ud83d"])
def test_what_ends_a_line_elsewhere_stands_in_completions(tmp_path: Path, text: str) -> None:
    kept(tmp_path, text)
    assert journal.finished(tmp_path)[1:] == ([{"prompt": text}], [[said(text)]])


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (journal.DRAWN, '"x"', "7", "a completion's text is 7"),
        (journal.DRAWN, '"prompt"', '"promt"', "a line has no prompt"),
        (journal.DRAWN, '"tokens"', '"token"', "KeyError: 'tokens'"),
        (journal.ASKED, '"seed"', '"sead"', "drawn.json does not say seed"),
        (journal.ASKED, "{", "[", "JSONDecodeError"),
    ],
)
def test_an_edited_file_is_one_line(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    kept(tmp_path, "x")
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(new.join(text.rsplit(old, 1)))
    with pytest.raises(UserError, match=f"cannot be read .*{message}"):
        journal.finished(tmp_path)


# --- judges ---------------------------------------------------------------------------------------------------------

GIVEN: dict[str, Any] = {}  # what the functions below give


def check(prompt: str, completion: str, answer: str) -> Any:
    return GIVEN["verdict"]


def count_tokens(completions: list[str], *, completion_ids: Any = None, **others: Any) -> list[float]:
    assert completion_ids is None  # nobody has them: a text that was drawn before has no tokens
    return [float(len(text)) for text in completions]


def answer_of(text: str) -> Any:
    return GIVEN["answer"]


@pytest.mark.parametrize("verdict", [None, "good", [1], math.inf, math.nan])
def test_a_checker_gives_numbers(verdict: Any) -> None:
    GIVEN["verdict"] = verdict
    with pytest.raises(UserError, match=f"the checker {__name__}:check gave .*(must give a number|must be finite)"):
        judging.CheckerJudge(f"{__name__}:check")([ROW], [[said(RIGHT)]])


def test_a_reward_function_is_given_what_there_is() -> None:
    found = judging.FunctionJudge([f"{__name__}:count_tokens"])([ROW], [[said("abc"), said("")]])
    assert found == [[3.0, 0.0]]


@pytest.mark.parametrize("answer", [7, ["14"]])
def test_the_answer_to_vote_on_is_a_text(answer: Any) -> None:
    GIVEN["answer"] = answer
    with pytest.raises(UserError, match=f"{__name__}:answer_of gave .*must give a text, or None"):
        judging.answer_of(f"{__name__}:answer_of")(RIGHT)
    GIVEN["answer"] = None
    assert judging.answer_of(f"{__name__}:answer_of")(RIGHT) is None
