"""What guards decide, from numbers alone; sums that find flipped bits; who does what, in words."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align_kit.config.steps import parse_steps
from align_kit.errors import Fault, UserError
from align_kit.telemetry.at_rest import PIECE, AtRest, Held
from align_kit.telemetry.guards import GO, LEAST, SKIP, STOP, WARN, WINDOW, Judge
from align_kit.telemetry.roll_call import RollCall, _as_values, _as_words, _who_does_what, named
from tests.harness import Ranks


def trained(judge: Judge, steps: int, loss: float = 2.0, noise: float = 0.1) -> Judge:
    """Let a judge see `steps` steps of a loss and a gradient norm with noise around them."""
    draw = random.Random(0)
    for step in range(1, steps + 1):
        around = [loss + draw.gauss(0, noise) for _ in range(2)]
        assert judge.decide(step, around, 1.0 + draw.gauss(0, noise)).what == GO
    return judge


# --- spikes ---------------------------------------------------------------------------------------------------


def test_no_spike_before_there_is_a_history() -> None:
    judge = Judge("skip")
    for step in range(1, LEAST):
        assert judge.decide(step, [10.0**step], 1.0).what == GO


@pytest.mark.parametrize(("policy", "what"), [("warn", WARN), ("skip", SKIP), ("rollback", STOP)])
def test_spike_by_policy(policy: str, what: str) -> None:
    decision = trained(Judge(policy), 40).decide(41, [2.0, 20.0], 1.0)
    assert decision.what == what and decision.why.startswith("the loss is 11 (usually 1.99, a spike from ")
    assert decision.skip_steps == ((40, 41) if policy == "rollback" else ())


def test_both_spikes_are_named() -> None:
    why = trained(Judge(), 40).decide(41, [50.0], 100.0).why
    assert "the loss is 50" in why and " and the gradient norm is 100" in why


def test_constant_numbers_do_not_trip() -> None:
    """Their deviation is 0: a floor of a part of the median keeps the last digit from being a spike."""
    judge = Judge("skip")
    for step in range(1, 100):
        assert judge.decide(step, [2.0 + 1e-6 * (step % 7)], 0.0).what == GO
    assert judge.decide(100, [2.0 * 1.13], 0.0).what == SKIP


def test_a_falling_number_is_no_spike() -> None:
    judge = trained(Judge("skip"), 40)
    assert judge.decide(41, [0.01], 0.001).what == GO


def test_noise_hardly_ever_trips() -> None:
    """Gradient norms have a heavy tail: of log-normal ones (sigma 0.5) about one in a thousand is called a spike."""
    judge, draw = Judge(), random.Random(1)
    found = [judge.decide(step, [draw.gauss(2, 0.2)], draw.lognormvariate(0, 0.5)).what for step in range(1, 20_001)]
    assert found.count(WARN) < 40 and not {SKIP, STOP} & set(found)


def rows(kind: str, rows_a_step: int, steps: int, seed: int) -> Iterator[float]:
    """Yield losses as real methods have them: means of `rows_a_step` rows, most alike and a few not."""
    draw = random.Random(seed)

    def row(step: int) -> float:
        if kind == "log-normal":  # sigma 1
            return draw.lognormvariate(0, 1)
        if kind == "two kinds":  # one pair in twenty is a hundred times as hard as the others
            return draw.lognormvariate(-3, 0.5) if draw.random() < 0.95 else draw.uniform(2, 5)
        if kind == "around 0":  # a clipped policy loss, negative as often as not, with a tail
            return draw.gauss(0, 0.02) * (1 if draw.random() < 0.93 else 8)
        margin = 6 * min(1.0, 2 * step / steps)  # preference: the margins of pairs grow, and with them their spread
        return math.log1p(math.exp(-draw.gauss(margin, 1 + margin / 2)))

    for step in range(steps):
        yield statistics.fmean(row(step) for _ in range(rows_a_step))


KINDS = ("log-normal", "preference", "two kinds", "around 0")


@pytest.mark.parametrize("policy", ["warn", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_differ_hardly_ever_trip(kind: str, policy: str) -> None:
    """Of 2,000 steps at most ten are called a spike, with one row a step, and skipping some does not skip more."""
    for rows_a_step, most in ((1, 10), (8, 1), (32, 0)):
        for seed in range(2):
            judge, found = Judge(policy), 0
            for step, loss in enumerate(rows(kind, rows_a_step, 2000, seed), 1):
                decision = judge.decide(step, [loss], None)
                found += decision.what != GO
                assert decision.what != STOP, decision.why
            assert found <= most, (rows_a_step, seed, found)


@pytest.mark.parametrize("kind", KINDS)
def test_among_such_rows_a_real_spike_is_found(kind: str) -> None:
    judge = Judge("skip")
    for step, loss in enumerate(rows(kind, 8, 500, 0), 1):
        judge.decide(step, [loss], None)
    assert judge.decide(501, [1000.0], None).what == SKIP


def test_a_few_times_the_usual_loss_is_a_spike_of_a_steady_run() -> None:
    """Twice the usual loss of a large batch (noise of 3 %), as in long pretrainings; and it does not become usual."""
    judge = Judge("skip")
    for step in range(1, 200):
        judge.decide(step, [random.Random(step).gauss(3.0, 0.1)], 1.0)
    assert [judge.decide(step, [6.0], 1.0).what for step in (200, 201, 202)] == [SKIP, SKIP, STOP]


def test_a_new_level_is_learned() -> None:
    """Where spikes are only said, half a window of a higher loss makes it the usual one."""
    judge = trained(Judge(), WINDOW)
    found = [judge.decide(WINDOW + step, [10.0 + 0.1 * (step % 3)], 1.0).what for step in range(1, WINDOW)]
    assert found[0] == WARN and found[-1] == GO and found.index(GO) <= WINDOW // 2 + 1


def test_what_was_skipped_is_not_usual() -> None:
    judge = trained(Judge("skip"), 40)
    before = judge.state_dict()["loss"]
    judge.decide(41, [100.0], 1.0)
    assert judge.state_dict()["loss"] == before


# --- what is not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "losses", "norm", "what", "why"),
    [
        ("warn", [1.0, math.nan], 1.0, STOP, "the loss of rank 1 is nan"),
        ("skip", [math.inf, 1.0], 1.0, SKIP, "the loss of rank 0 is inf"),
        ("rollback", [math.nan, math.nan], 1.0, STOP, "the loss of ranks 0-1 is nan"),
        ("warn", [1.0, 1.0], math.inf, SKIP, "the gradient norm is not finite"),
        ("rollback", [1.0, 1.0], math.nan, STOP, "the gradient norm is not finite"),
    ],
)
def test_not_finite(policy: str, losses: list[float], norm: float, what: str, why: str) -> None:
    decision = Judge(policy).decide(5, losses, norm)
    assert (decision.what, decision.why) == (what, why)
    assert decision.skip_steps == ((4, 5) if policy == "rollback" else ())


def test_three_in_a_row() -> None:
    judge = Judge()
    found = [judge.decide(step, [1.0], math.inf if step != 3 else 1.0).what for step in range(1, 7)]
    assert found == [SKIP, SKIP, GO, SKIP, SKIP, STOP] and judge.skipped == 5


def test_first_step_has_none_before_it() -> None:
    assert Judge("rollback").decide(1, [math.nan], 1.0).skip_steps == (1,)


def test_a_resumed_judge_decides_alike() -> None:
    """Through JSON, in the middle of a history with a step that was skipped."""
    import json

    judge = trained(Judge("skip"), 30)
    judge.decide(31, [math.inf], 1.0)
    resumed = Judge("skip")
    resumed.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    draw = random.Random(3)
    for step in range(32, 80):
        numbers = [draw.gauss(2, 0.1) * (20 if step % 9 == 0 else 1)]
        assert judge.decide(step, numbers, 1.0) == resumed.decide(step, numbers, 1.0)


# --- steps in words -------------------------------------------------------------------------------------------


def test_steps_in_words() -> None:
    assert parse_steps("17,18") == {17, 18}
    assert parse_steps(" 120-122, 300") == {120, 121, 122, 300}


@pytest.mark.parametrize("text", ["", "a", "3-", "5-3", "0", "-4", "1,,2"])
def test_steps_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="names no steps; write 17,18 or 120-180"):
        parse_steps(text)


# --- memory at rest -------------------------------------------------------------------------------------------


def tensors(seed: int = 0) -> dict[str, Held]:
    """Return tensors of several types, one of them a view that starts in the middle of a word, one frozen."""
    made = torch.Generator().manual_seed(seed)
    flat = torch.randn(1001, generator=made)
    return {
        "flat": Held(flat[1:]),
        "half": Held(torch.randn(77, generator=made).bfloat16()),
        "long": Held(torch.randn(PIECE // 4 + 50, generator=made)),
        "matrix": Held(torch.randn(13, 7, generator=made)),
        "base": Held(torch.randn(64, generator=made), fixed=True),
    }


def flip(tensor: torch.Tensor, draw: random.Random) -> int:
    """Flip a random bit of a random element and return the byte it lies in."""
    size = tensor.element_size()
    words = tensor.view(-1).view({2: torch.int16, 4: torch.int32}[size])
    place, bit = draw.randrange(words.numel()), draw.randrange(8 * size - 1)
    words[place] ^= 1 << bit
    return place * size


def test_every_flipped_bit_is_found() -> None:
    """200 flips, each of one random bit: every one is found, and no other piece is accused."""
    held, rest, draw = tensors(), AtRest(), random.Random(5)
    for _ in range(200):
        rest.remember(lambda: held)
        assert rest.changed(lambda: held) == []
        name = draw.choice(list(held))
        byte = flip(held[name].tensor, draw)
        (found,) = rest.changed(lambda: held)
        assert found.name == name and found.start <= byte < found.stop
        rest.forget()


def test_what_an_update_changes_is_right() -> None:
    held, rest = tensors(), AtRest()
    rest.remember(lambda: held)
    held["flat"].tensor.add_(1)
    rest.remember(lambda: held)
    assert rest.changed(lambda: held) == []


def test_a_base_is_compared_with_what_it_was_at_first() -> None:
    held, rest = tensors(), AtRest()
    rest.remember(lambda: held)
    held["base"].tensor[3] += 1  # in an update, that has no business there
    rest.remember(lambda: held)
    assert [piece.name for piece in rest.changed(lambda: held)] == ["base"]


def test_what_is_no_longer_held_is_let_be() -> None:
    held, rest = tensors(), AtRest()
    rest.remember(lambda: held)
    held.pop("matrix")
    held["half"] = Held(torch.empty(0))
    assert rest.changed(lambda: held) == []


def test_a_share_keeps_to_its_time_and_gets_round() -> None:
    """A tenth of the time: every piece has its turn, and what is spent stays near the share."""
    held = {f"part {number}": Held(torch.randn(50_000)) for number in range(20)}
    rest, spent, began, seen = AtRest(share=0.1), 0.0, time.process_time(), set()
    work = torch.randn(200, 200)
    while time.process_time() - began < 1.0:
        work = torch.tanh(work @ work)
        at = time.process_time()
        assert rest.changed(lambda: held) == []
        rest.remember(lambda: held)
        spent += time.process_time() - at
        seen |= set(rest._expected)
    assert len(seen) == len(held)
    assert spent < 0.2 * (time.process_time() - began)


# --- roll call ------------------------------------------------------------------------------------------------


def test_alone_nothing_is_exchanged() -> None:
    call = RollCall()
    call.wish = 3
    assert call("step", 4, 2, [1.5, math.pi]) == [(1.5, math.pi)]
    assert call.agreed == 3
    mine = torch.tensor([0.1, 3.0])
    assert torch.equal(call.summed("step", 1, 1, mine), mine)
    assert call.words("so") == ["so"]


def test_numbers_travel_with_all_their_bits() -> None:
    values = (0.1, -0.0, math.inf, 1e-310, float(torch.tensor(0.1)))
    assert _as_values(_as_words(values)) == values


def test_who_does_what() -> None:
    rows = [(1, 7, 4, 2)] * 2 + [(3, 6, 9, 0)] + [(1, 7, 4, 2)]
    assert _who_does_what(rows) == (
        "ranks 0-1, 3 trains step 7 of 4 micro-batches; rank 2 evaluates 9 batches at step 6"
    )
    assert "(2 sums)" in _who_does_what([(1, 7, 4, 2), (1, 7, 4, 3)])


def test_ranks_in_words() -> None:
    assert named([3]) == "rank 3"
    assert named([0, 2, 3, 4, 9]) == "ranks 0, 2-4, 9"


@pytest.mark.slow
def test_roll_call_of_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """Sums have the bits of a reduction; wishes are shared; who disagrees is told so on every rank."""
    ranks.run(function="tests.test_guards:call_the_roll", ranked=True, place=str(tmp_path)).ok()
    said = [(tmp_path / f"{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert "rank 0 trains step 2 of 3 micro-batches; rank 1 saves step 2" in said[0]


def call_the_roll(place: str) -> int:
    """What each of two ranks does in the test above."""
    import os

    import torch.distributed as dist

    dist.init_process_group("gloo")
    call, rank = RollCall.of_all_ranks(), int(os.environ["RANK"])
    mine: Any = torch.tensor([0.1, 3.0, 1e-8]) * (rank * 7 + 1)
    reduced = mine.clone()
    dist.all_reduce(reduced)
    call.wish = 1 << rank
    assert torch.equal(call.summed("step", 1, 3, mine), reduced)
    assert call.agreed == 3
    assert call.words(f"I am {rank}") == ["I am 0", "I am 1"]
    try:
        call("save" if rank else "step", 2, 0 if rank else 3)
    except Fault as fault:
        Path(place, str(rank)).write_text(str(fault))
    dist.destroy_process_group()
    return 0
