"""Batch arithmetic: derived, said in a sentence, and refused with the nearest values where it does not divide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_kit.config import BatchPlan, derive, smaller
from align_kit.errors import UserError

SIZES = st.integers(1, 64)


@pytest.mark.parametrize(
    ("plan", "unit", "sentence"),
    [
        (derive(2, 2, None, 64), "pairs", "64 pairs = 2 per rank x 2 ranks x 16 accumulation steps"),
        (derive(4, 1, 1), "rows", "4 rows = 4 per rank x 1 rank x 1 accumulation step"),
        (derive(4, 2, 3), "rows", "24 rows = 4 per rank x 2 ranks x 3 accumulation steps"),
    ],
)
def test_the_sentence(plan: BatchPlan, unit: str, sentence: str) -> None:
    assert plan.sentence(unit) == sentence


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((3, 2, None, 64), ["3 per rank x 2 ranks = 6", "use global_batch_size 60 or 66", "batch_size 2 or 4"]),
        ((4, 2, None, 4), ["use global_batch_size 8,", "per_device_train_batch_size 1 or 2"]),
        ((1, 3, None, 64), ["1 per rank x 3 ranks = 3", "use global_batch_size 63 or 66"]),
        ((1, 3, None, None, 2), ["2 training rows for 3 ranks"]),
        ((1, 1, None, None, 0), ["0 training rows for 1 rank"]),
    ],
)
def test_what_does_not_divide_names_what_does(arguments: tuple[int | None, ...], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        derive(*arguments)  # type: ignore[arg-type]
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@given(per_device=SIZES, world_size=SIZES, wanted=st.integers(1, 4096))
def test_a_global_batch_is_kept_or_refused(per_device: int, world_size: int, wanted: int) -> None:
    if wanted % (per_device * world_size):
        with pytest.raises(UserError):
            derive(per_device, world_size, None, wanted)
    else:
        assert derive(per_device, world_size, None, wanted).global_batch == wanted


@given(per_device=SIZES, world_size=SIZES, accumulation=SIZES)
def test_a_smaller_micro_batch_keeps_the_global_batch(per_device: int, world_size: int, accumulation: int) -> None:
    plan = derive(per_device, world_size, accumulation)
    less = smaller(plan)
    if per_device == 1:
        assert less is None
    else:
        assert less is not None and less.per_device < per_device
        assert less.global_batch == plan.global_batch
        between = range(less.per_device + 1, per_device)
        assert not [size for size in between if (per_device * accumulation) % size == 0], "it is the next smaller one"


@pytest.mark.parametrize(
    ("per_device", "world_size", "accumulation", "rows", "steps"),
    [(2, 2, 4, 64, 4), (2, 2, 4, 65, 5), (2, 2, 4, 3, 1), (1, 1, 1, 7, 7), (8, 1, 2, 16, 1)],
)
def test_steps_per_epoch(per_device: int, world_size: int, accumulation: int, rows: int, steps: int) -> None:
    assert derive(per_device, world_size, accumulation, rows=rows).steps_per_epoch == steps
