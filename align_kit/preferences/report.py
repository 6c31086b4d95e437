"""The report in Markdown: what was found, what it means for training, what was dropped and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from align_kit.preferences.filters import Decision

Section = dict[str, Any]
# Krippendorff 2004, "Content Analysis", p. 241: what alpha should reach, and below what not even tentative conclusions
# should rest on the labels.
RELIABLE, TENTATIVE = 0.800, 0.667
WORTH_SAYING = 0.01  # rate of wrong labels from which a loss should know of it
MOST_NAMED = 12  # annotators in a table
LEAK = 0.05  # from even, beyond which length is said to give labels away (the near end of the interval)


def markdown(where: str, found: Section, decision: Decision, *, written: bool) -> str:
    """Return the whole report on the rows of `where`."""
    blocks = [f"# Preferences of {where}", _opening(found)]
    sections = {
        "Agreement": _agreement,
        "Length": _length_of_labels if found["kind"] == "binary" else _length_of_pairs,
        "Chosen against rejected": _sides,
        "Scores": _scores_of_labels if found["kind"] == "binary" else _scores_of_pairs,
        "Flipped labels": _flips,
    }
    for title, section in sections.items():
        if lines := list(section(found)):
            blocks += [f"## {title}", "\n".join(lines)]
    blocks += ["## What was dropped" if written else "## What would be dropped", *_dropped(found, decision)]
    return "\n\n".join(blocks)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = (0,)) -> str:
    """Return a Markdown table that reads well as text: columns of `words` to the left, numbers to the right."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    rule = ["-" * width if place in words else "-" * (width - 1) + ":" for place, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        fitted = [cell.ljust(width) if place in words else cell.rjust(width)
                  for place, (cell, width) in enumerate(zip(cells, widths, strict=True))]  # fmt: skip
        return f"| {' | '.join(fitted)} |"

    return "\n".join(map(line, (head, rule, *rows)))


def percent(part: float, whole: float = 1) -> str:
    """Return a share in per cent, one decimal; a dash where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _between(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f} %"


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"


def _opening(found: Section) -> str:
    copies, kind = found["copies"], found["kind"]
    what = {"preference": "pair", "binary": "labelled completion"}.get(kind, "completion")
    said = [_count(found["rows"], what)]
    if labels := found.get("labels"):
        said.append(f"{labels['true']:,} true and {labels['false']:,} false")
    if copies["repeated"]:
        said.append(f"{copies['repeated']:,} of them copies of another row")
    if copies["contradicted"]:
        how = "in both orders" if kind == "preference" else "with both labels"
        said.append(f"{copies['contradicted']:,} found {how} ({_count(copies['rows_of_contradicted'], 'row')})")
    return ", ".join(said) + "."


# --- agreement --------------------------------------------------------------------------------------------------------


def _agreement(found: Section) -> Iterator[str]:
    if not (seen := found.get("agreement")):
        return
    yield _alpha(seen)
    if rows := seen["rows_with_two_votes"]:
        yield f"- {_count(seen['votes'], 'vote')} on {_count(rows, 'row')}, for {_listed(seen['values'])}."
        differing = percent(seen["pairs_of_votes_that_differ"])
        yield f"- {percent(seen['unanimous'], rows)} of these rows are unanimous; {differing} of pairs of votes differ."
    if seen["rows_with_fewer"]:
        yield f"- {_count(seen['rows_with_fewer'], 'row')} with fewer than two votes say nothing about agreement."
    if not seen["votes_name_labels"] and found["kind"] != "prompt_completion":
        words = "chosen and rejected" if found["kind"] == "preference" else "true and false"
        yield f"- Votes are not named {words}, so they are held against each other, not against the recorded label."
    if seen["ties"]:
        yield f"- Ties, without a most common vote: {_count(seen['ties'], 'row')}; --drop-ties drops them."
    if seen["majority_against_label"]:
        yield (
            f"- In {_count(seen['majority_against_label'], 'row')} most votes are against the recorded label; "
            "--agreement 0.5 drops them."
        )
    if seen["annotators"]:
        yield from _annotators(seen["annotators"])


def _annotators(each: dict[str, dict[str, int]]) -> Iterator[str]:
    """Say how far each annotator goes with the others; of many, those that do so least."""
    judged = {who: one for who, one in each.items() if one["votes"]}
    least = sorted(judged, key=lambda who: judged[who]["with_most_of_the_others"] / judged[who]["votes"])[:MOST_NAMED]
    if len(judged) > len(least):
        yield f"- Of {len(judged):,} annotators, these {len(least)} go least with the others:"
    rows = [(who, f"{judged[who]['votes']:,}", percent(judged[who]["with_most_of_the_others"], judged[who]["votes"]))
            for who in least]  # fmt: skip
    if rows:
        yield "\n" + table(("annotator", "votes", "with most of the others"), rows)


def _alpha(seen: Section) -> str:
    if seen["alpha"] is None:
        return f"- Krippendorff's alpha is undefined: {seen['why_undefined']}."
    low, high = seen["alpha_low"], seen["alpha_high"]
    interval = " (too few rows for an interval)" if low is None else f" (95 % interval {low:.3f} to {high:.3f})"
    if seen["alpha"] >= RELIABLE:
        meaning = f"reliable by the customary {RELIABLE:.2f}"
    elif seen["alpha"] >= TENTATIVE:
        meaning = f"below the customary {RELIABLE:.2f}, enough for tentative conclusions ({TENTATIVE})"
    else:
        meaning = f"below {TENTATIVE}, too little even for tentative conclusions"
    return f"- Krippendorff's alpha, {seen['level']}: {seen['alpha']:.3f}{interval}, {meaning}."


def _listed(values: Sequence[str], most: int = 8) -> str:
    more = f" and {len(values) - most} other values" if len(values) > most else ""
    return ", ".join(values[:most]) + more


# --- length and likeness ----------------------------------------------------------------------------------------------


def _length_of_labels(found: Section) -> Iterator[str]:
    seen = found["length"]
    if seen["true_longer"] is None:
        yield "- All labels are alike, so length cannot tell them apart."
        return
    yield f"- True ones have {seen['mean_true']:,.0f} characters on average, false ones {seen['mean_false']:,.0f}."
    yield f"- A true one is longer than a false one in {percent(seen['true_longer'])} of cases (50 %: by chance)."
    yield f"- Point-biserial correlation of length and label: {_signed(seen['point_biserial'])}."


def _length_of_pairs(found: Section) -> Iterator[str]:
    if not (seen := found.get("length")):
        return
    if not (unequal := seen["unequal"]):
        yield "- Both sides of every pair are equally long."
        return
    interval = seen["chosen_longer_interval"]
    yield (
        f"- Chosen is longer than rejected in {percent(seen['chosen_longer'], unequal)} of {_count(unequal, 'pair')} "
        f"of unequal length (95 % interval {_between(interval)})."
    )
    yield (
        f"- Mean length: chosen {seen['mean_chosen']:,.0f}, rejected {seen['mean_rejected']:,.0f} characters; "
        f"difference {seen['mean_difference']:+,.0f}."
    )
    yield f"- Point-biserial correlation of length and being chosen: {_signed(seen['point_biserial'])}."
    if interval[0] > 0.5 + LEAK or interval[1] < 0.5 - LEAK:
        yield _leak(seen)
    rows = [(_ratio(one), f"{one['pairs']:,}", percent(one["longer_chosen"], one["pairs"]), _between(one["interval"]))
            for one in seen["bins"] if one["pairs"]]  # fmt: skip
    yield "\n" + table(("longer side is", "pairs", "longer one chosen", "95 % interval"), rows)


def _leak(seen: Section) -> str:
    longer = seen["chosen_longer"] * 2 > seen["unequal"]
    right = max(seen["chosen_longer"], seen["unequal"] - seen["chosen_longer"])
    word = "longer" if longer else "shorter"
    return (
        f"- Length gives labels away: choosing the {word} side is right for {percent(right, seen['unequal'])} of these "
        f"pairs, so a model lowers its loss by writing {word} answers. Watch the length of its completions; "
        "--max-length-ratio drops the most unequal pairs."
    )


def _ratio(one: Section) -> str:
    if one["up_to"] is None:
        return f"over {one['above']:g} times as long"
    return f"{one['above']:g} to {one['up_to']:g} times as long"


def _sides(found: Section) -> Iterator[str]:
    if not (seen := found.get("sides")):
        return
    yield f"- Edit similarity in words (1: the same words, 0: none in common): median {seen['median']:.2f}."
    rows = [(f"at least {least}", count) for least, count in seen["at_least"].items()]
    rows = [(name, count) for name, count in (*rows, ("equal texts", seen["identical"])) if count]
    if rows:
        shares = [(name, f"{count:,}", percent(count, found["rows"])) for name, count in rows]
        yield "\n" + table(("similarity", "pairs", "of all"), shares)
    if (near := seen["at_least"][f"{seen['near']:g}"] - seen["identical"]) > 0:
        yield (
            f"\nSides as alike as {seen['near']:g} ({_count(near, 'pair')}) differ in a few words. That is right where "
            "those words are the point (a number, a name), else noise, and DPO may lower the likelihood of both sides "
            f"(Pal et al. 2024). --near {seen['near']:g} drops such pairs."
        )


# --- scores and flips -------------------------------------------------------------------------------------------------


def _scores_of_labels(found: Section) -> Iterator[str]:
    if not (seen := found.get("rewards")):
        return
    yield from _unscored(seen)
    if seen["ranked_right"] is None:
        yield "- The scored rows all have one label, so scores cannot tell labels apart."
    else:
        yield f"- A true one is scored above a false one in {percent(seen['ranked_right'])} of cases (50 %: by chance)."


def _scores_of_pairs(found: Section) -> Iterator[str]:
    if not (seen := found.get("rewards")):
        return
    yield from _unscored(seen)
    if unequal := seen["scored"] - seen["equal"]:
        right, interval = percent(seen["chosen_higher"], unequal), _between(seen["chosen_higher_interval"])
        yield f"- Chosen is scored above rejected in {right} of {_count(unequal, 'pair')} (95 % interval {interval})."
    if seen["equal"]:
        yield f"- Equal scores: {_count(seen['equal'], 'pair')}; --drop-ties drops them."
    if seen["scored"]:
        yield f"- Chosen's score less rejected's: mean {seen['mean_margin']:+.3g}, median {seen['median_margin']:+.3g}."


def _unscored(seen: Section) -> Iterator[str]:
    if seen["without_score"]:
        yield f"- {_count(seen['without_score'], 'row')} have no usable score (null, NaN, infinite)."


def _flips(found: Section) -> Iterator[str]:
    for one in found["flips"]:
        interval = f"95 % interval {100 * one['low']:.1f} to {100 * one['high']:.1f} %"
        what = one["what"].capitalize()
        yield f"- {what} is wrong in {percent(one['rate'])} of cases ({interval}), judged by {one['method']}."
        if "majority_rate" in one:
            yield f"  The majority of {one['majority_of']} such votes is wrong in {percent(one['majority_rate'])}."
        yield f"  Assumed: {one['assumption']}."
    if found["kind"] == "preference" and any(one["rate"] >= WORTH_SAYING for one in found["flips"]):
        yield (
            "- DPO takes the rate of wrong labels as label_smoothing: with loss_type sigmoid it trusts them less "
            "(Mitchell 2023), with robust it corrects for the flips on average (Chowdhury et al. 2024)."
        )


# --- what is dropped --------------------------------------------------------------------------------------------------


def _dropped(found: Section, decision: Decision) -> Iterator[str]:
    rows = [(step.name, f"{step.rows:,}", f"{step.dropped:,}", percent(step.dropped, found["rows"]), step.rule)
            for step in decision.steps]  # fmt: skip
    yield table(("step", "rows in", "dropped", "of all", "rule"), rows, words=(0, 4))
    yield f"{decision.kept:,} of {found['rows']:,} rows are kept ({percent(decision.kept, found['rows'])})."
