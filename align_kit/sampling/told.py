"""What `align-kit sample` says of its work: a table on the screen, and the card of what it wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align_kit.data.made import MadeSet
from align_kit.sampling.choosing import NO_MAJORITY, NO_PAIR, NONE_GOOD, Chosen
from align_kit.sampling.options import ALL, MAJORITY, Asked

REPEATED_PROMPTS, NO_ROOM = "repeated prompts", "prompts without room"
UNASKED = {
    REPEATED_PROMPTS: "the same prompt stands before",
    NO_ROOM: "empty, or longer than the model reads beside a completion",
}
PHASES = {"sft": ("sft",), "preference": ("dpo", "orpo", "reward", "kto"), "binary": ("kto",)}
FORMATS = {"sft": "prompt_completion", "preference": "preference", "binary": "binary"}
NO_FACTS = ("from", "licences", "checker", "seed", "unasked")  # of how it was drawn: told elsewhere in the card
RULES = {
    "cut off": "no end within the longest completion",
    "empty": "nothing but white space",
    "control tokens": "spells a control token",
    "without a score": "longer than the judge reads",
    "without a chain of thought": "chain and answer cannot be parted",
    "repeated": "the same text stands before",
}


def table(asked: Asked, found: Chosen, unasked: Mapping[str, int], at_least: float | None) -> str:
    """Return what was left out, and what share of completions and prompts was good.

    `unasked` counts the prompts that the model was not given, by reason.
    """
    lines = [f"{'left out':<34} {'of':<12} {'count':>8}  rule"]
    for name, of, count, rule in _steps(asked, found, unasked, at_least):
        share = count / (found.drawn if of == "completions" else found.answered + sum(unasked.values()))
        lines.append(f"{name:<34} {of:<12} {count:>8,}  {rule} ({share:.1%})")
    if len(lines) == 1:
        lines = ["nothing was left out"]
    return "\n".join([*lines, *_shares(asked, found)])


def _steps(
    asked: Asked, found: Chosen, unasked: Mapping[str, int], at_least: float | None
) -> list[tuple[str, str, int, str]]:
    steps = [(name, "prompts", count, UNASKED[name]) for name, count in unasked.items()]
    steps += [(name, "completions", count, RULES[name]) for name, count in found.completions.items()]
    margin = f"scores differ by no more than {asked.margin:g}" if asked.margin else "all score alike"
    enough = f"no completion scores {at_least:g}" if at_least is not None else "no completion"
    rules = {
        NO_PAIR: margin + (f", or the best below {at_least:g}" if at_least is not None else ""),
        NONE_GOOD: enough,
        NO_MAJORITY: f"no answer has {asked.agreement:.0%} of the votes",
    }
    steps += [(name, "prompts", count, rules.get(name, "")) for name, count in found.prompts.items()]
    return [step for step in steps if step[2]]


def _shares(asked: Asked, found: Chosen) -> list[str]:
    said = []
    if found.judged:
        what = "agree with the majority" if asked.keep == MAJORITY else "are good"
        prompts, some = sum(found.passed.values()), sum(n for good, n in found.passed.items() if good)
        counts = ", ".join(f"{good}: {found.passed[good]:,}" for good in sorted(found.passed))
        said.append(
            f"{found.good / found.judged:.1%} of {found.judged:,} completions {what}, and at least one of "
            f"{some / prompts:.1%} of {prompts:,} prompts; prompts by how many: {counts}"
        )
    if found.votes:
        share = found.right_votes / found.votes
        said.append(f"the majority gives the expected answer to {share:.1%} of {found.votes:,} prompts")
    return said


def made_set(
    asked: Asked,
    words: Sequence[str],
    drawn_as: Mapping[str, Any],
    found: Chosen,
    judge: Mapping[str, Any],
    unasked: Mapping[str, int],
    at_least: float | None,
) -> MadeSet:
    """Return what the card says of the rows: teacher, prompts, seed, judge, and the counts of what was left out."""
    teacher = drawn_as["model"]
    reason = asked.reason_template is not None
    facts = {name: value for name, value in drawn_as.items() if name not in NO_FACTS}
    shares = {"good_completions": found.good, "judged_completions": found.judged} if found.judged else {}
    return MadeSet(
        name=asked.name,
        pretty_name=f"Completions of {teacher}, kept by {asked.keep}",
        licences=tuple(drawn_as["licences"]) or ("unknown",),
        phases=PHASES[asked.write],
        format="reason" if reason else FORMATS[asked.write],
        reason_template=_template(asked) if reason else None,
        checker=drawn_as["checker"] if asked.write != "binary" else None,
        filters=[
            {"name": name, "rule": f"{rule} ({of})", "dropped": count}
            for name, of, count, rule in _steps(asked, found, unasked, at_least)
        ],
        sections={
            "Motivation": "Written to train a student on what a teacher model answers, or the teacher itself on the "
            "better of its own answers.",
            "Uses": f"Made for {', '.join(PHASES[asked.write])}. It holds text of the model {teacher}, whose mistakes "
            "it has: its judge sees no more than it was made to. The terms of that model's licence may bind what is "
            "trained on it.",
        },
        made={
            "command": ["align-kit", "sample", *words],
            "seed": drawn_as["seed"],
            "from": drawn_as["from"],
            "teacher": teacher,
            **{name: value for name, value in facts.items() if name != "model"},
            "keep": asked.keep,
            **({} if at_least is None or asked.keep in (ALL, MAJORITY) else {"at_least": at_least}),
            **({"agreement": asked.agreement} if asked.keep == MAJORITY else {}),
            **judge,
            "prompts": found.answered,
            "completions": found.drawn,
            **shares,
        },
    )


def _template(asked: Asked) -> str | None:
    from align_kit.sampling.choosing import template_of

    assert asked.reason_template is not None
    return template_of(asked.reason_template).text
