"""What the facts of all rows say together, section by section, as plain values: what `--json` prints."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from align_kit.preferences import flips
from align_kit.preferences.alpha import Scale, Tally, alpha
from align_kit.preferences.facts import Facts
from align_kit.preferences.filters import verdicts
from align_kit.preferences.measures import point_biserial, ranked_right, wilson

if TYPE_CHECKING:
    import numpy as np

Section = dict[str, Any]
RATIOS = (1.0, 1.1, 1.25, 1.5, 2.0, 4.0, math.inf)  # longer over shorter side
SIMILARITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


def agreement(facts: Facts, scale: Scale, seed: int) -> Section:
    """Return how far the annotators agree: alpha, unanimous rows, and each annotator against the others."""
    whole = alpha(facts.tally(), scale, seed=seed)
    said = verdicts(facts)
    return {
        "level": scale.level,
        "alpha": whole.alpha,
        "alpha_low": whole.low,
        "alpha_high": whole.high,
        "why_undefined": whole.why or None,
        "rows_with_two_votes": whole.units,
        "rows_with_fewer": len(facts) - whole.units,
        "votes": whole.votes,
        "values": list(whole.values),
        "unanimous": whole.unanimous,
        "pairs_of_votes_that_differ": whole.disagreement,
        "votes_name_labels": bool(facts.names()),
        "ties": sum(one.tied for one in said),
        "majority_against_label": sum(one.against for one in said),
        "annotators": {
            who: {"votes": votes, "with_most_of_the_others": agreed}
            for who, (votes, agreed) in sorted(facts.casts.items())
        },
    }


def _interval(part: int, whole: int) -> list[float]:
    return list(wilson(part / whole if whole else 0.0, whole))


def length_of_pairs(facts: Facts) -> Section:
    """Return whether the chosen side is the longer one, by how much, and how that goes with the difference."""
    import numpy as np

    chosen, rejected = (np.array(lengths, dtype=float) for lengths in facts.lengths)
    longer, unequal = int((chosen > rejected).sum()), int((chosen != rejected).sum())
    both = (chosen > 0) & (rejected > 0)
    return {
        "unit": "characters",
        "unequal": unequal,
        "chosen_longer": longer,
        "chosen_longer_interval": _interval(longer, unequal),
        "mean_chosen": float(chosen.mean()),
        "mean_rejected": float(rejected.mean()),
        "mean_difference": float((chosen - rejected).mean()),
        "median_ratio": float(np.median(chosen[both] / rejected[both])) if both.any() else None,
        "point_biserial": point_biserial(chosen, rejected),
        "bins": list(_bins(chosen, rejected)),
    }


def _bins(chosen: np.ndarray, rejected: np.ndarray) -> list[Section]:
    """Return, by how many times as long the longer side is, how often that is the chosen one."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.maximum(chosen, rejected) / np.minimum(chosen, rejected)
    found = []
    for low, high in zip(RATIOS, RATIOS[1:], strict=False):
        # Equal lengths are in no bin: neither side is the longer one.
        inside = (ratio > low) & (ratio <= high)
        pairs, longer = int(inside.sum()), int((inside & (chosen > rejected)).sum())
        last = None if math.isinf(high) else high
        found.append({"above": low, "up_to": last, "pairs": pairs, "longer_chosen": longer,
                      "interval": _interval(longer, pairs)})  # fmt: skip
    return found


def length_of_labels(facts: Facts) -> Section:
    """Return whether completions labelled true are longer than those labelled false."""
    import numpy as np

    lengths, labels = np.array(facts.lengths[0], dtype=float), np.array(facts.labels, dtype=bool)
    yes, no = lengths[labels], lengths[~labels]
    return {
        "unit": "characters",
        "mean_true": float(yes.mean()) if len(yes) else None,
        "mean_false": float(no.mean()) if len(no) else None,
        "true_longer": ranked_right(yes, no),
        "point_biserial": point_biserial(yes, no),
    }


def likeness(facts: Facts, near: float) -> Section:
    """Return how alike the sides of a pair are."""
    import numpy as np

    similar = np.array(facts.similar)
    return {
        "median": float(np.median(similar)),
        "identical": sum(facts.identical),
        "at_least": {f"{least:g}": int((similar >= least).sum()) for least in sorted({*SIMILARITIES, near})},
        "near": near,
    }


def copies(facts: Facts) -> Section:
    """Return how many rows repeat another one, and how many say the opposite of one."""
    counts = Counter(zip(facts.keys, facts.reverse, strict=True))
    both = {key for key, reverse in counts if (key, 1 - reverse) in counts}
    return {
        "different": len({key for key, _ in counts}),
        "repeated": len(facts) - len(counts),
        "contradicted": len(both),
        "rows_of_contradicted": sum(times for (key, _), times in counts.items() if key in both),
        "empty": sum(facts.empty),
    }


def labels(facts: Facts) -> Section:
    """Return how many completions are labelled true and false."""
    good = sum(facts.labels)
    return {"true": good, "false": len(facts) - good}


def rewards(facts: Facts) -> Section:
    """Return how far scores and labels agree."""
    import numpy as np

    first, second = (np.array(scores) for scores in facts.scores)
    if facts.paired:
        margins = first - second
        margins = margins[np.isfinite(margins)]
        right, equal = int((margins > 0).sum()), int((margins == 0).sum())
        unequal = len(margins) - equal
        return {
            "scored": len(margins),
            "without_score": len(facts) - len(margins),
            "equal": equal,
            "chosen_higher": right,
            "chosen_higher_interval": _interval(right, unequal),
            "mean_margin": float(margins.mean()) if len(margins) else None,
            "median_margin": float(np.median(margins)) if len(margins) else None,
        }
    known, truth = np.isfinite(first), np.array(facts.labels, dtype=bool)
    return {
        "scored": int(known.sum()),
        "without_score": int((~known).sum()),
        "ranked_right": ranked_right(first[known & truth], first[known & ~truth]),
    }


def flipped(facts: Facts) -> list[Section]:
    """Return every estimate of wrong labels that the facts allow."""
    import numpy as np

    found: list[flips.Flips | Section | None] = []
    if facts.voted:
        found.append(_of_votes(facts.tally()))
    elif (twice := _labelled_again(facts)).patterns:
        found.append(flips.from_votes(twice, "a label", "rows that were labelled more than once"))
    if facts.paired and facts.scores[0]:
        margins = np.array(facts.scores[0]) - np.array(facts.scores[1])
        found.append(flips.from_margins(margins[np.isfinite(margins)]))
    return [vars(one) if isinstance(one, flips.Flips) else one for one in found if one is not None]


def _of_votes(tally: Tally) -> Section | None:
    """Return how often a vote is wrong, and between two labels also how often a usual row's majority is."""
    one = flips.from_votes(tally, "a vote", "how often two votes of a row differ")
    if one is None or len(tally.values()) > 2:
        return None if one is None else vars(one)
    votes = sum(times * sum(count for _, count in pattern) for pattern, times in tally.patterns.items())
    usual = round(votes / one.rows)
    majority = {"majority_of": usual, "majority_rate": flips.majority_error(one.rate, usual)} if usual > 2 else {}
    return {**vars(one), **majority}


def _labelled_again(facts: Facts) -> Tally:
    """Return the labels of rows that stand more than once as votes; empty where copies never contradict each other.

    Copies that all agree are as likely one label copied as a label given twice, and would say that nobody errs.
    """
    counts = Counter(zip(facts.keys, facts.reverse, strict=True))
    tally = Tally()
    for key in dict.fromkeys(facts.keys):
        votes = [("one", counts[key, 0]), ("other", counts[key, 1])]
        tally.count(tuple((side, times) for side, times in votes if times))
    return tally if len(tally.values()) == 2 and any(len(pattern) == 2 for pattern in tally.patterns) else Tally()


def all_of(
    facts: Facts, scale: Scale, *, near: float, seed: int, voted: bool, scored: bool
) -> Section:
    """Return all sections that the facts allow, by name."""
    found: Section = {"rows": len(facts), "kind": facts.kind}
    if voted:
        found["agreement"] = agreement(facts, scale, seed)
    if facts.kind == "binary":
        found["labels"] = labels(facts)
        found["length"] = length_of_labels(facts)
    if facts.paired:
        found["length"] = length_of_pairs(facts)
        found["sides"] = likeness(facts, near)
    found["copies"] = copies(facts)
    if scored:
        found["rewards"] = rewards(facts)
    found["flips"] = flipped(facts)
    return found
