"""What the entries of `datasets` ask of a mixture, and the account of what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align_kit.data.mix import capacities_of, shares_of, tempered
from align_kit.errors import UserError

MIXTURE_KEYS = ("weight", "fraction", "max_share", "epochs")


@dataclass(frozen=True)
class SourceReport:
    """What one source gave: how it was named, rows after slicing and mixing, licences, warnings, content digest.

    `share` is what was asked for, after temperature and caps (None where nothing was), `realised` the share of the
    mixture's rows it has; `epochs` how often its rows were taken, `unseen` how many never; `used_up`: it could give no
    more, and the mixture ends there.
    """

    path: str
    split: str
    kind: str
    format: str
    rows: int
    rows_read: int
    licences: tuple[str, ...]
    digest: str
    share: float | None = None
    warnings: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)  # of built-in data: version and digest of what it was made from
    realised: float = 1.0
    epochs: float = 1.0
    unseen: int = 0
    used_up: bool = False


@dataclass(frozen=True)
class Asked:
    """What an entry brings to a mixture, and what it asks of it."""

    where: str
    rows: int
    weight: float | None = None
    card_weight: float | None = None  # where no entry gives a weight
    fraction: float | None = None
    max_share: float | None = None
    epochs: float | None = None


@dataclass(frozen=True)
class Shares:
    """What the entries together come to: shares of 1 (None: all of all), passes over each, one after another or not."""

    shares: list[float] | None
    epochs: list[float] | None
    interleave: bool

    def capacities(self, counts: Sequence[int]) -> list[int]:
        """Return how many rows each source may give, repeats counted."""
        return capacities_of(counts, self.epochs or [1.0] * len(counts))


def resolve(asked: Sequence[Asked], temperature: float | None = None) -> Shares:
    """Return the shares that entries and temperature ask for; raises UserError where they contradict each other."""
    _check(asked, temperature)
    epochs = None
    if any(one.epochs is not None for one in asked):
        epochs = [1.0 if one.epochs is None else one.epochs for one in asked]
    weighted = any((one.weight or one.card_weight) is not None for one in asked)
    capped = any(one.max_share is not None for one in asked)
    counts = [one.rows for one in asked]
    parts: Sequence[float]
    if asked[0].fraction is not None:
        parts = [one.fraction or 0.0 for one in asked]
        return Shares(shares_of(parts, [1.0] * len(asked)) if len(asked) > 1 else None, None, False)
    if temperature is not None:
        parts = tempered(counts, temperature)
    elif weighted:
        parts = [one.weight or one.card_weight or 1.0 for one in asked]
    elif capped:
        parts = capacities_of(counts, epochs or [1.0] * len(counts))
    else:
        return Shares(None, epochs, epochs is not None)
    caps = [one.max_share or 1.0 for one in asked]
    shares = shares_of(parts, caps)
    return Shares(shares if len(asked) > 1 else None, epochs, True)


def figures(wanted: Shares, counts: Sequence[int], used: Sequence[int]) -> list[dict[str, Any]]:
    """Return what a report says of each source that gave `used` of its `counts` rows; see `SourceReport`."""
    capacities = wanted.capacities(counts)
    return [
        {
            "share": wanted.shares[place] if wanted.shares else None,
            "realised": size / max(sum(used), 1),
            "epochs": size / count,
            "unseen": max(count - size, 0),
            "used_up": wanted.shares is not None and size == capacities[place],
        }
        for place, (count, size) in enumerate(zip(counts, used, strict=True))
    ]


def _check(asked: Sequence[Asked], temperature: float | None) -> None:
    fractions = [one.fraction for one in asked if one.fraction is not None]
    weights = any(one.weight is not None for one in asked)
    if fractions and weights:
        raise UserError("datasets: fraction and weight were both given; drop one")
    if fractions and len(fractions) < len(asked):
        raise UserError("datasets: fraction must be given for every source or for none")
    ours = [name for name in ("max_share", "epochs") if any(getattr(one, name) is not None for one in asked)]
    ours += ["mixture_temperature"] if temperature is not None else []
    if fractions and ours:
        raise UserError(f"datasets: fraction, which repeats and caps nothing, and {ours[0]} were given; take weight")
    if temperature is not None and not temperature > 0:
        raise UserError(f"the temperature of the mixture is {temperature}; give a number above 0: 1 goes by size")
    if temperature is not None and weights:
        raise UserError("a weight and a temperature of the mixture were both given, and both say the shares; drop one")
    for one in asked:
        if one.max_share is not None and not one.max_share <= 1:
            raise UserError(f"{one.where}: max_share is {one.max_share}; give a share of the mixture, above 0 to 1")


def lines(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each source of a mixture, given the fields of its `SourceReport`; none for one taken whole."""
    if len(sources) == 1 and sources[0]["epochs"] == 1:
        return []
    return [_line(one) for one in sources]


def _line(one: Mapping[str, Any]) -> str:
    asked = "" if one["share"] is None else f" ({one['share']:.1%} asked)"
    said = [f"{one['path']} {one['split']}: {one['rows']} rows, {one['realised']:.1%} of all{asked}"]
    if one["epochs"] != 1 and not one["unseen"]:
        said.append(f"{one['epochs']:.4g} epochs")
    if one["unseen"]:
        said.append(f"{one['unseen']} of its {one['rows_read']} never seen")
    if one["used_up"]:
        said.append("used up: the mixture ends with it")
    return ", ".join(said)
