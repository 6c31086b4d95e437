"""Rewards: what functions and models are shown, how their numbers add up, and one line for each mistake."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from align_kit.errors import UserError
from tests.small import make_rows, make_tokenizer, write_scorer

if TYPE_CHECKING:
    from align_kit.trainers.rewards import Judged

NOBODY: Any = None  # the policy, which a reward that lives apart does not ask for


def judged(prompts: list[Any] | None = None, **changes: Any) -> Judged:
    """Return three completions, the second without an end, tokenised by the small tokenizer."""
    from align_kit.data.collate import pad_BT
    from align_kit.trainers.rewards import Judged

    words = make_tokenizer()
    prompts = prompts or [row["prompt"] for row in make_rows("prompt", 3)]
    completions, ended = [" amber", " basil cedar", ""], [True, False, True]
    texts = zip(completions, ended, strict=True)
    parts = [words(text)["input_ids"] + [words.eos_token_id] * end for text, end in texts]
    rows = [words(_text(prompt))["input_ids"] + ids for prompt, ids in zip(prompts, parts, strict=True)]
    given = {
        "prompts": prompts, "completions": completions, "completion_ids": parts, "answers": ["amber", "x", None],
        "ended": ended,
        "batch": {
            "input_ids": pad_BT(rows, words.pad_token_id), "attention_mask": pad_BT([[1] * len(r) for r in rows], 0)
        },
    }  # fmt: skip
    return Judged(**{**given, **changes})


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def judge(function: Callable[..., Any], name: str = "mine") -> Any:
    from align_kit.trainers.rewards import FunctionJudge

    return FunctionJudge(name, function)


def mistake(call: Callable[[], Any]) -> str:
    """Return the one line that a user's mistake is answered with."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# --- functions --------------------------------------------------------------------------------------------


def test_a_function_sees_what_trl_shows() -> None:
    """Prompts and completions as strings, tokens, and the answer column, all by name."""
    seen: dict[str, Any] = {}

    def reward(**given: Any) -> list[float]:
        seen.update(given)
        return [1.0, 2, True]

    given = judged()
    scores = judge(reward)(NOBODY, given)
    assert scores.tolist() == [1.0, 2.0, 1.0] and str(scores.dtype) == "torch.float32"
    assert seen == {
        "prompts": given.prompts, "completions": [" amber", " basil cedar", ""],
        "completion_ids": given.completion_ids, "answer": ["amber", "x", None],
    }  # fmt: skip


def test_conversations_come_as_messages() -> None:
    """A completion to messages is one assistant message in a list, as in TRL."""
    talk = [[{"role": "user", "content": row["prompt"]}] for row in make_rows("prompt", 3)]
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        seen.extend([prompts, completions])
        return [0.0] * 3

    judge(reward)(NOBODY, judged(talk))
    assert seen[0] == talk
    assert seen[1] == [[{"role": "assistant", "content": text}] for text in (" amber", " basil cedar", "")]


@pytest.mark.parametrize(("given", "words"), [
    ([1.0, 2.0], "gave 2 numbers for 3 completions; it must give one each"),
    ([1.0] * 4, "gave 4 numbers for 3 completions"),
    ([1.0, math.nan, 0.0], "gave nan for ' basil cedar'; every reward must be finite"),
    ([1.0, 2.0, -math.inf], "gave -inf for ''; every reward must be finite"),
    ([1.0, "good", 2.0], "it must give a list of numbers"),
    ([1.0, None, 2.0], "it must give a list of numbers"),
    (None, "gave None; it must give a list of numbers"),
    (0.5, "gave 0.5; it must give a list of numbers"),
])  # fmt: skip
def test_what_is_no_list_of_numbers(given: Any, words: str) -> None:
    line = mistake(lambda: judge(lambda **_: given)(NOBODY, judged()))
    assert line.startswith("the reward function mine ") and words in line


def test_arrays_and_tensors_are_lists_of_numbers() -> None:
    import numpy as np
    import torch

    for given in (np.array([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0]), (one for one in (1, 2, 3))):
        assert judge(lambda given=given, **_: given)(NOBODY, judged()).tolist() == [1.0, 2.0, 3.0]


def test_a_function_that_takes_other_arguments() -> None:
    line = mistake(lambda: judge(lambda completions: [0.0] * len(completions))(NOBODY, judged()))
    assert "the reward function mine cannot be called" in line and "**kwargs" in line


def test_an_error_inside_a_function_stays_what_it_is() -> None:
    """Its author needs the place, not our word for it."""
    def reward(**_: Any) -> list[float]:
        return [1.0 + None]  # type: ignore[operator]

    with pytest.raises(TypeError, match="unsupported operand"):
        judge(reward)(NOBODY, judged())


# --- by name ----------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return what writes a module into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    return write


@pytest.mark.parametrize("dotted", ["rewards_here:length", "rewards_here.length"])
def test_a_function_of_the_working_directory(module: Callable[[str, str], None], dotted: str) -> None:
    from align_kit.trainers.rewards import judge_of

    module("rewards_here", "def length(completions, **_):\n    return [len(text) for text in completions]\n")
    found = judge_of(dotted)
    assert found.name == "length" and found(NOBODY, judged()).tolist() == [6.0, 12.0, 0.0]


@pytest.mark.parametrize(("dotted", "words"), [
    ("length", "names no module; give module:function"),
    ("no_such_module:length", "cannot be imported (No module named 'no_such_module')"),
    ("rewards_broken:length", "cannot be imported (No module named 'nothing_there')"),
    ("rewards_unreadable:length", "cannot be imported"),
    ("rewards_raising:length", "cannot be imported (ZeroDivisionError"),
    ("..:length", "cannot be imported"),
    ("math:no_such", "math has no function 'no_such'"),
    ("math:pi", "math has no function 'pi'"),
    ("math:", "math has no function ''"),
])  # fmt: skip
def test_names_that_lead_nowhere(module: Callable[[str, str], None], dotted: str, words: str) -> None:
    from align_kit.trainers.rewards import judge_of

    module("rewards_broken", "import nothing_there\n")
    module("rewards_unreadable", "def length(:\n")
    module("rewards_raising", "1 / 0\n")
    line = mistake(lambda: judge_of(dotted))
    assert line.startswith("reward_funcs: ") and words in line


# --- the checker ------------------------------------------------------------------------------------------


def test_a_checker_gives_one_for_the_exact_answer() -> None:
    from align_kit.trainers.rewards import judge_of

    found = judge_of("checker:align_kit.data.checkers:check")
    texts = ["#### 42", "2 + 2 = 4\n#### 41", "1 + 41 = 42\n#### 42"]
    assert found.name == "checker"
    assert found(NOBODY, judged(completions=texts, answers=["#### 42"] * 3)).tolist() == [1.0, 0.0, 1.0]
    talk = [[{"role": "user", "content": "how many?"}]] * 3
    assert found(NOBODY, judged(talk, completions=texts, answers=["#### 42"] * 3)).tolist() == [1.0, 0.0, 1.0]


def test_a_checker_without_answers() -> None:
    from align_kit.trainers.rewards import judge_of

    found = judge_of("checker:align_kit.data.checkers:check")
    assert "the checker needs an answer to each prompt" in mistake(lambda: found(NOBODY, judged()))


# --- reward models ----------------------------------------------------------------------------------------


class Constant:
    """A frozen role that gives every sequence the same score."""

    def __init__(self, score: float) -> None:
        self.score = score

    def scores(self, policy: Any, batch: Any) -> Any:
        import torch

        return torch.full((len(batch["input_ids"]),), self.score)


def test_a_weighted_sum() -> None:
    from align_kit.trainers.rewards import ModelJudge, Rewards

    judges = [ModelJudge("model", Constant(2.0)), judge(lambda **_: [1.0, 2.0, 3.0])]
    total, each = Rewards(judges, [0.5, -1.0])(NOBODY, judged())
    assert total.tolist() == [0.0, -1.0, -2.0]
    assert each.tolist() == [[2.0, 1.0], [2.0, 2.0], [2.0, 3.0]]


def test_a_model_that_gives_no_number_is_told_on() -> None:
    from align_kit.trainers.rewards import ModelJudge

    line = mistake(lambda: ModelJudge("model_1", Constant(math.nan))(NOBODY, judged()))
    assert "the reward model model_1 gave nan" in line


def other_tokenizer() -> Any:
    """Return words of another kind: more of them, and another end."""
    words = make_tokenizer()
    words.add_tokens([" basil", "amber"])
    words.eos_token = "<|im_end|>"
    return words


def held(place: Path, words: Any) -> tuple[Any, Any]:
    """Return (role, classifier) of the small scorer with a tokenizer of its own."""
    from transformers import AutoModelForSequenceClassification

    from align_kit.frozen.hold import RewardModel

    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1).eval()
    model.config.pad_token_id = words.pad_token_id
    return RewardModel(SimpleNamespace(role="reward"), model, words), model  # type: ignore[arg-type]


def test_a_reward_model_in_the_policys_words(tmp_path: Path) -> None:
    """Each score is what the classifier gives the row alone, without padding."""
    import torch

    from align_kit.trainers.rewards import ModelJudge

    role, model = held(write_scorer(tmp_path / "scorer", seed=2), make_tokenizer())
    given = judged()
    rows = [ids[mask.bool()] for ids, mask in zip(given.batch["input_ids"], given.batch["attention_mask"], strict=True)]
    with torch.no_grad():
        expected = [float(model(row[None]).logits) for row in rows]
    assert ModelJudge("model", role)(NOBODY, given).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("talk", [False, True])
def test_a_reward_model_with_other_words_reads_the_text(tmp_path: Path, talk: bool) -> None:
    """The same prompt and completion in its own tokens; its own end where the completion ended, no other's."""
    import torch

    from align_kit.trainers.rewards import ModelJudge

    words = other_tokenizer()
    role, model = held(write_scorer(tmp_path / "scorer", seed=2), words)
    prompts: list[Any] = [row["prompt"] for row in make_rows("prompt", 3)]
    if talk:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    given = judged(prompts)
    rows = []
    for prompt, completion, ended in zip(prompts, given.completions, given.ended, strict=True):
        if talk:
            turns = [*prompt, {"role": "assistant", "content": completion}]
            rows.append(words.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])
        else:
            rows.append(words(prompt + completion)["input_ids"] + [words.eos_token_id] * ended)
    with torch.no_grad():
        expected = [float(model(torch.tensor([row])).logits) for row in rows]
    found = ModelJudge("model", role, words)(NOBODY, given).tolist()
    assert found == pytest.approx(expected, abs=1e-5) and len(set(found)) == 3
    assert found != pytest.approx(ModelJudge("model", role)(NOBODY, given).tolist(), abs=1e-3)


def test_rewards_that_share_a_name_are_told_apart() -> None:
    from align_kit.trainers.rewards import Rewards

    ones = [judge(lambda **_: [1.0] * 3, name) for name in ("length", "exact", "length")]
    assert Rewards(ones, [1.0] * 3).names == ["length_0", "exact", "length_2"]
