"""What cleaning and surveying say: tables, remarks, and what goes into the card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align_kit import cards
from align_kit.clean import rules, screen
from align_kit.clean.chain import NO_LINE
from align_kit.clean.cleaning import EXACT, NEAR, Cleaning, Found
from align_kit.clean.measures import STOP_WORDS
from align_kit.clean.options import Asked
from align_kit.clean.overlap import RUN
from align_kit.data import shapes
from align_kit.data.made import MadeSet
from align_kit.data.shapes import KIND_COLUMNS

_MANY = 0.3  # a rule that drops this share of all rows deserves a second look
_QUANTILES = (0, 0.1, 0.5, 0.9, 0.99, 1)
_LONGEST = 5


def table(found: Found, asked: Asked) -> str:
    """Return what each step dropped: step, rule, rows in, dropped, share of all rows."""
    lines, left = [], found.rows
    for step, rule, asks in _in_order(asked):
        if dropped := found.dropped[step, rule]:
            lines.append((step, f"{rule} ({asks})" if asks else rule, f"{left:,}", f"{dropped:,}",
                          f"{dropped / found.rows:.2%}"))  # fmt: skip
            left -= dropped
    lines.append(("kept", "", f"{left:,}", "", f"{left / found.rows:.2%}" if found.rows else ""))
    return _aligned(("step", "rule", "rows in", "dropped", "share"), lines)


def _in_order(asked: Asked) -> Iterator[tuple[str, str, str]]:
    """Yield the steps and rules of the chain in its order, with what they ask for."""
    plan = asked.plan
    yield "reading", "cannot be read", ""
    yield from (("empty", rule, "") for rule in ("no text", "no completion"))
    yield from (("screening", rule, "") for rule in ("licence", "blocked source", "copyright notice"))
    yield from (("harmful", index.name, "") for index in plan.harmful)
    yield "language", f"not {plan.language}", ""
    yield "quality", NO_LINE, ""
    yield from (("quality", name, asks) for name, asks in _asked_for(asked, cuts=False))
    yield from (("pair", rule, "") for rule in ("chosen is rejected", "chosen nearly rejected"))
    yield from (("decontamination", index.name, f"runs of {RUN} words") for index in plan.against)
    yield from (("duplicates", EXACT, ""), ("duplicates", NEAR, f"Jaccard at least {plan.threshold:g}"))


def _asked_for(asked: Asked, *, cuts: bool) -> list[tuple[str, str]]:
    """Return each rule for texts, or for lines, with its bounds: sources may be held to different ones."""
    bounds: dict[str, dict[str, None]] = {}
    for rule in (rule for of_source in asked.plan.rules for rule in of_source if rule.cuts == cuts):
        bounds.setdefault(rule.full_name, {})[rule.bounds] = None
    return [(name, " / ".join(asks)) for name, asks in bounds.items()]


def remarks(found: Found, asked: Asked, seconds: float, workers: int) -> list[str]:
    """Return what is to be said beside the table: personal data, notices, twins across sources, doubts, the speed."""
    said = []
    if found.cut:
        said.append(f"lines cut out of texts: {_cut_lines(found.cut)}")
    if found.personal:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.personal.items()))
        said.append(f"personal data replaced: {counts}")
    if found.notices:
        said.append(f"{found.notices:,} of the rows that passed have a copyright notice (--copyright drop drops them)")
    if found.across:
        said.append(f"{found.across:,} of the duplicates repeat a row of another source")
    said += [f"warning: {text}" for text in _doubts(found, asked)]
    each = "" if workers == 1 else f" with {workers} workers"
    said.append(f"{found.rows:,} rows in {seconds:.1f} s, {found.rows / max(seconds, 1e-9):,.0f} rows/s{each}")
    return said


def _cut_lines(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} by {rule}" for rule, count in sorted(counted.items()))


def _doubts(found: Found, asked: Asked) -> Iterator[str]:
    """Yield why a user might not want what the rules did."""
    plan = asked.plan
    if found.nowhere:
        yield (f"{found.nowhere:,} of {found.rows:,} rows have none of {', '.join(screen.SOURCE_COLUMNS)}: the block "
               "list could not screen them")  # fmt: skip
    if plan.language is not None and plan.language not in STOP_WORDS:
        yield f"no stop words are known for {plan.language}; the rule gopher.stop_words was not applied"
    if plan.kind != "text" and _asked_for(asked, cuts=True):
        yield f"rules that cut lines out are for texts: none was applied to rows of {plan.kind}"
    for step, rule, _ in _in_order(asked):
        dropped = found.dropped[step, rule]
        if step != "quality" or dropped <= _MANY * found.rows:
            continue
        hint = "is it English? --language names another" if rule == "gopher.stop_words" else "look at --keep-dropped"
        yield f"{rule} alone dropped {dropped / found.rows:.0%} of all rows; {hint}, or change the rule with --rules"


def made_set(name: str, found: Found, asked: Asked, command: Sequence[str], seed: int) -> MadeSet:
    """Return what the card of the cleaned set says beside its rows."""
    plan, sources = asked.plan, asked.sources
    licences = dict.fromkeys(licence for source in sources for licence in source.licences)
    filters = [
        {"name": "lines", "rule": rule, "dropped": 0, "cut": found.cut[rule], "threshold": asks}
        for rule, asks in _asked_for(asked, cuts=True)
        if found.cut[rule]
    ]
    filters += [
        {"name": step, "rule": rule, "dropped": found.dropped[step, rule], **({"threshold": asks} if asks else {})}
        for step, rule, asks in _in_order(asked)
        if found.dropped[step, rule] and step != "decontamination"
    ]
    checkers = {source.card.block.checker if source.card else None for source in sources}
    return MadeSet(
        name=name,
        pretty_name=f"{name}: " + ", ".join(source.name for source in sources) + ", cleaned",
        licences=tuple(licences),
        phases=[phase for phase, kinds in cards.PHASE_KINDS.items() if plan.kind in kinds and phase != "eval"],
        **shapes.kept_apart(plan.kind, [source.shape for source in sources], plan.columns),
        stats={"rows_read": found.rows},
        filters=filters,
        decontamination=[
            {"against": index.name, "n": RUN, "dropped": found.dropped["decontamination", index.name]}
            for index in plan.against
        ],
        pii=dict(sorted(found.personal.items())),
        made={"command": list(command), "seed": seed, "from": _origins(found, asked)},
        checker=checkers.pop() if len(checkers) == 1 else None,
        languages=[plan.language] if plan.language else (),
    )


def _origins(found: Found, asked: Asked) -> list[dict[str, Any]]:
    return [
        {
            **({"card": source.card.name} if source.card else {"file": source.name}),
            "split": source.split,
            "rows": rows,
            **({"digest": digest} if (digest := source.digest()) else {}),
        }
        for source, rows in zip(asked.sources, found.read, strict=True)
    ]


# --- the survey ---------------------------------------------------------------------------------------------------


def figures(work: Cleaning, asked: Asked) -> dict[str, Any]:
    """Return the figures of a survey as plain values; shares are of all rows."""
    found = work.found
    return {
        "sources": {source.name: rows for source, rows in zip(asked.sources, found.read, strict=True)},
        "kind": asked.plan.kind,
        "rows": found.rows,
        **_lengths(work, _part_names(asked.plan.kind)),
        "would_drop": [
            {"step": step, "rule": rule, "asks": asks, "rows": count, "share": round(count / found.rows, 6)}
            for step, rule, asks in _in_order(asked)
            if (count := found.dropped[step, rule])
        ],
        "would_cut": dict(sorted(found.cut.items())),
        "sets_of_rules": {rule.set: rules.cited(rule.set) for of_source in asked.plan.rules for rule in of_source},
        "personal_data": dict(sorted(found.personal.items())),
        "copyright_notices": found.notices,
        "duplicates_across_sources": found.across,
        "languages": {code: round(count / found.rows, 4) for code, count in found.languages.most_common()},
    }


def _lengths(work: Cleaning, names: Sequence[str]) -> dict[str, Any]:
    """Return the quantiles of each part's length, and the longest rows."""
    import numpy as np

    if not work.found.lengths:  # no row could be read
        return {"lengths": {}, "longest": []}
    lengths = np.concatenate(work.found.lengths)
    whole = lengths[:, :, 0].sum(axis=1)
    quantiles = np.quantile(lengths, _QUANTILES, axis=0)
    shown = [f"{share:g}" for share in _QUANTILES]
    return {
        "lengths": {
            name: {
                unit: dict(zip(shown, quantiles[:, place, column].astype(int).tolist(), strict=True))
                for column, unit in enumerate(("characters", "words"))
            }
            for place, name in enumerate(names)
        },
        "longest": [
            {"row": work.where(place), "characters": int(whole[place])}
            for place in np.argsort(-whole, kind="stable")[:_LONGEST].tolist()
        ],
    }


def _part_names(kind: str) -> tuple[str, ...]:
    if kind == "messages":
        return ("what is asked", "what is answered")
    return tuple(name for name in KIND_COLUMNS[kind] if name != "label")


def page(found: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    said = [f"# {', '.join(found['sources'])}: {found['rows']:,} rows of {found['kind']}", ""]
    heads = ("part", "unit", "least", "10%", "median", "90%", "99%", "most")
    lengths = [
        (name, unit, *(f"{value:,}" for value in of_unit.values()))
        for name, units in found["lengths"].items()
        for unit, of_unit in units.items()
    ]
    said += [_markdown(heads, lengths), ""]
    drops = [
        (one["step"], one["rule"], one["asks"], f"{one['rows']:,}", f"{one['share']:.2%}")
        for one in found["would_drop"]
    ]
    said += ["Each rule by itself (a row may break several):", ""]
    said += [_markdown(("step", "rule", "asks", "rows", "share"), drops) if drops else "no rule would drop a row.", ""]
    if found["would_cut"]:
        said.append(f"- lines that would be cut out: {_cut_lines(found['would_cut'])}")
    personal = ", ".join(f"{count:,} {kind}" for kind, count in found["personal_data"].items()) or "none found"
    said.append(f"- personal data: {personal}")
    said.append(f"- copyright notices: {found['copyright_notices']:,} rows")
    if found["duplicates_across_sources"]:
        said.append(f"- duplicates of a row in another source: {found['duplicates_across_sources']:,}")
    mix = ", ".join(f"{code} {share:.1%}" for code, share in list(found["languages"].items())[:8])
    said.append(f"- languages: {mix or 'not told without the extra language (py3langid)'}")
    said += [f"- longest: {one['row']}, {one['characters']:,} characters" for one in found["longest"]]
    return "\n".join(said)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [heads, *rows]
    )
