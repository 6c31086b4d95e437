"""Settling a way of computing: both ways on a batch that shares, rounding let pass, anything else seen."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from align_kit.forward.agree import settle, with_relatives
from align_kit.forward.attention import CannotWalk
from align_kit.forward.door import door_of, open_door, pack_for
from align_kit.forward.layout import pack_rows
from align_kit.forward.logprobs import token_logps
from tests.families import BATCHES, batch_of, tiny, words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_rounding_is_let_pass(family: str, dtype: torch.dtype) -> None:
    model, batch = tiny(family).to(dtype), batch_of(BATCHES["pairs"])
    open_door(model, "shared")
    assert settle(model, lambda some: token_logps(model, some).logps_BT, batch) is None
    door = door_of(model)
    assert (door.mode, door.walked, door.plain) == ("shared", 0, 0), "the trial counts"


@pytest.mark.parametrize("wrong", [0.01, float("nan"), float("inf")])
def test_another_answer_is_seen(wrong: float) -> None:
    """One token of one sequence is enough, and a number that is none."""
    model, batch = tiny("llama"), batch_of(BATCHES["pairs"])
    open_door(model, "shared")

    def answer(some: Mapping[str, Tensor]) -> Tensor:
        logps_BT = token_logps(model, some).logps_BT.clone()
        if door_of(model).mode == "shared":
            logps_BT[2, 8] += wrong
        return logps_BT

    why = settle(model, answer, batch)
    assert why is not None and "shared differs from plain" in why and "\n" not in why
    assert door_of(model).mode == "plain" and pack_for(model, batch) is None


@pytest.mark.parametrize(
    ("error", "why"), [(CannotWalk("it does not"), "it does not"), (KeyError("x"), "packed fails (KeyError: 'x')")]
)
def test_an_error_of_the_walk_is_a_reason(error: Exception, why: str) -> None:
    model = tiny("llama")
    open_door(model, "packed")

    def answer(some: Mapping[str, Tensor]) -> Tensor:
        raise error

    assert settle(model, answer, batch_of(BATCHES["pairs"])) == why
    assert door_of(model).mode == "plain"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_no_reason(error: Exception) -> None:
    model = tiny("llama")
    open_door(model, "packed")

    def answer(some: Mapping[str, Tensor]) -> Tensor:
        raise error

    with pytest.raises(type(error), match="memory"):
        settle(model, answer, batch_of(BATCHES["pairs"]))


def test_plain_goes_a_sequence_at_a_time() -> None:
    """The trial takes no more memory than a step: logits of the whole batch would."""
    model, batch = tiny("llama"), batch_of(BATCHES["pairs"])
    open_door(model, "shared")
    rows: list[int] = []

    def answer(some: Mapping[str, Tensor]) -> Tensor:
        if door_of(model).mode == "plain":
            rows.append(len(some["input_ids"]))
        return token_logps(model, some).logps_BT

    settle(model, answer, batch)
    assert rows == [1] * len(batch["input_ids"])


def test_what_is_plain_is_not_tried() -> None:
    model = tiny("llama")
    open_door(model, "plain")
    assert settle(model, lambda _: pytest.fail("it was"), {}) is None


@pytest.mark.parametrize("masked", [True, False])
def test_relatives_share(masked: bool) -> None:
    """Rows with nothing in common, as SFT's: with their relatives there is a prefix to get wrong."""
    alone = batch_of([(words(11, 1), words(9, 2)), (words(8, 3), words(5, 4))], wider=1)
    batch = {name: alone[name] for name in alone if masked or name != "loss_mask"}
    both = with_relatives(batch)
    assert both.keys() == batch.keys() and all(len(both[name]) == 4 for name in both)
    assert all(torch.equal(both[name][:2], batch[name]) for name in batch)
    assert all(segment.prefix == 0 for segment in pack_rows(batch, whole=True).segments.items)
    assert sorted(segment.prefix for segment in pack_rows(both, whole=True).segments.items) == [0, 0, 6, 10]
