"""Rows that can be read and should not be trained on as they are: counted, said, and refused where they are too many.

What is one row's mistake is refused where the row is read (`shapes`). Here is what only its share makes a mistake.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align_kit.config.suspicions import SUSPICIONS
from align_kit.data.chains import chain_of
from align_kit.data.digest import canonical_json, text_digest
from align_kit.data.render import Renderer, Row
from align_kit.data.report import TokeniseReport
from align_kit.data.shapes import KIND_COLUMNS
from align_kit.errors import UserError

LOOKED_AT = 64  # conversations whose rendered text is searched for what they say
END = 24  # characters of a message's begin and end that are searched for: a template may cut and trim between
ANSWERS = ("completion", "chosen", "rejected")
ANSWERED = ("prompt_completion", "messages", "preference", "binary")  # kinds whose rows have an end that is learnt
Seen = dict[int, int]  # 64 bits of what a row is about -> of what it says


def inspect(rows: Sequence[Row], kind: str, renderer: Renderer, report: TokeniseReport, seen: Seen) -> None:
    """Count in `report` what is suspicious about canonical rows; `seen` remembers them from one call to the next."""
    for row in rows:
        report.inspected += 1
        for name in _faults(row, kind, seen):
            report.suspect(name)
        if report.rendered < LOOKED_AT and (turns := _conversation(row)) and any(_said(turns[-1])):
            report.rendered += 1
            text = renderer.rendered(turns, row)
            if not all(_stands(said, text) for said in _said(turns[-1])):
                report.suspect("unrendered")
            if not all(_stands(chain, text) for _, chain in map(_said, row.get("messages") or [])):
                report.suspect("forgotten")


def _faults(row: Row, kind: str, seen: Seen) -> Iterator[str]:
    about, says = _claim(row, kind)
    if about in seen:
        yield "repeated" if seen[about] == says else "contradicted"
    seen.setdefault(about, says)
    if any(row.get(name) in ("", []) for name in ANSWERS):
        yield "empty"
    if kind == "preference" and row["chosen"] == row["rejected"]:
        yield "identical"
    if _misordered(row):
        yield "misordered"


def _claim(row: Row, kind: str) -> tuple[int, int]:
    """Return what a row is about and what it says: of a pair which side is better, of a completion its label."""
    texts = [canonical_json(row.get(name)) for name in KIND_COLUMNS[kind]]
    if kind == "preference":
        prompt, *sides = texts
        return _bits(prompt, *sorted(sides)), _bits(sides[0])
    if kind == "binary":
        return _bits(*texts[:-1]), _bits(texts[-1])
    return _bits(*texts), 0


def _bits(*texts: str) -> int:
    return int(text_digest(*texts)[:16], 16)


def _misordered(row: Row) -> bool:
    """Tell whether a conversation begins with the assistant or ends without it, or an answer is not the assistant's."""
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        return True
    answers = [row[name] for name in ANSWERS if isinstance(row.get(name), list) and row[name]]
    if any(answer[0]["role"] in ("user", "system") for answer in answers):
        return True
    roles = [turn["role"] for turn in row.get("messages") or [] if turn["role"] not in ("system", "developer")]
    return bool(roles) and (roles[0] == "assistant" or roles[-1] != "assistant")


def _conversation(row: Row) -> list[Row]:
    """Return the messages of a row that holds a conversation, with its (first) answer; none of a row of strings."""
    turns = row.get("messages") or row.get("prompt")
    if not isinstance(turns, list):
        return []
    answer: list[Row] = next((row[name] for name in ANSWERS if isinstance(row.get(name), list)), [])
    return [*turns, *answer]


def _said(turn: Row) -> tuple[str, str]:
    """Return what a message says and the chain of thought before it, "" for what it has not."""
    content, chain = turn.get("content"), chain_of(turn)
    return content.strip() if isinstance(content, str) else "", (chain or "").strip()


def _stands(said: str, text: str) -> bool:
    return said[:END] in text or said[-END:] in text


# --- what is said of it ---------------------------------------------------------------------------------------------


def shares(report: TokeniseReport, repeats: int = 0) -> dict[str, tuple[int, int]]:
    """Return for each suspicion how many rows of how many it is about; `repeats` were asked for, by epochs."""
    found = {
        "dropped": (sum(report.dropped.values()), report.rows_in),
        "unended": (report.unended, report.rows_in),
        "cut": (report.cut_completions if report.kind in ANSWERED else 0, report.rows_in),
        **{name: (count, report.inspected) for name, count in report.suspected.items()},
    }
    if "repeated" in found:
        found["repeated"] = (max(0, report.suspected["repeated"] - repeats), report.inspected)
    for name in ("unrendered", "forgotten"):
        if name in found:
            found[name] = (report.suspected[name], report.rendered)
    return {name: found[name] for name in SUSPICIONS if name in found and found[name][0]}


def judged(report: TokeniseReport, limits: Mapping[str, float], where: str, repeats: int = 0) -> list[str]:
    """Return a warning for each suspicion about a larger share of the rows than may pass unsaid.

    Raises `UserError` for the first whose share is above its limit: the one in `limits`, else `SUSPICIONS`' own.
    """
    warnings = []
    for name, (count, total) in shares(report, repeats).items():
        suspicion, share = SUSPICIONS[name], count / max(total, 1)
        line = f"{where}: {count} of {total} rows ({share:.1%}) {suspicion.what}{_first(name, report)}"
        limit = limits.get(name, suspicion.limit)
        if limit < 1 and share > limit:
            raise UserError(f"{line}; {suspicion.remedy}, or let it pass with --data_limits '{{\"{name}\": 1}}'")
        if share > suspicion.said:
            warnings.append(f"{line}; {suspicion.remedy}")
    return warnings


def _first(name: str, report: TokeniseReport) -> str:
    if name == "dropped":
        return f" ({', '.join(f'{count} {why}' for why, count in report.dropped.items())})"
    return f" (the first is row {report.first[name]})" if name in report.first else ""


def repeats_asked(account: Mapping[str, Any]) -> int:
    """Return how many rows of a mixture are there again because its epochs ask for it."""
    return sum(max(0, source["rows"] - source["rows_read"]) for source in account["sources"])
