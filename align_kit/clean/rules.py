"""The quality rules as data: read from `rules.yaml`, laid over by a file of the user's, applied to a text in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from align_kit.clean.measures import MEASURES, Text
from align_kit.errors import UserError, unknown

FILE = Path(__file__).with_name("rules.yaml")
PER_SOURCE = "for"


@dataclass(frozen=True)
class Rule:
    """A text is good where its measure is in bounds: at least `min`, at most `max`, more than `above`, under `below`.

    `answers`: it is for completions, not for texts. `cuts`: it is for the lines of a text, and a bad one is cut out.
    """

    set: str
    name: str
    measure: str
    of: Any = None
    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    answers: bool = False
    cuts: bool = False

    def measured(self, text: Text) -> float | None:
        """Return what the rule measures of `text`, None where it means nothing."""
        return MEASURES[self.measure](text, self.of)

    def is_broken(self, text: Text) -> bool:
        """Tell whether the text is outside the bounds."""
        value = self.measured(text)
        if value is None:
            return False
        return (
            (self.min is not None and value < self.min)
            or (self.max is not None and value > self.max)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    @property
    def full_name(self) -> str:
        """Its name with its set's: `gopher.words`."""
        return f"{self.set}.{self.name}"

    @property
    def bounds(self) -> str:
        """What the rule asks for, as `50 to 100000` or `at most 0.3`."""
        if self.min is not None and self.max is not None:
            return f"{self.min:g} to {self.max:g}"
        words = {"min": "at least", "max": "at most", "above": "more than", "below": "less than"}
        return ", ".join(f"{word} {getattr(self, name):g}" for name, word in words.items() if _is_set(self, name))


def _is_set(rule: Rule, name: str) -> bool:
    return getattr(rule, name) is not None


def broken(text: Text, rules: Sequence[Rule]) -> Iterator[Rule]:
    """Yield the rules that a text breaks, in their order."""
    return (rule for rule in rules if rule.is_broken(text))


def cut(text: str, rules: Sequence[Rule], language: str = "en") -> tuple[str, list[Rule]]:
    """Return a text without the lines that break a rule, and for each of those the first rule it broke.

    A blank line between paragraphs stays one blank line. A text of which no line is cut is returned as it is.
    """
    lines: list[str] = []
    hits: list[Rule] = []
    for line in text.split("\n"):
        shown = line.strip()
        hit = next(broken(Text(shown, language), rules), None) if shown else None
        if hit is not None:
            hits.append(hit)
        elif shown or (lines and lines[-1]):
            lines.append(line if shown else "")
    return ("\n".join(lines).strip() if hits else text), hits


def load_rules(names: Sequence[str], overlay: str | None = None, source: str | None = None) -> tuple[Rule, ...]:
    """Return the rules of the sets `names`, in order; `overlay` is a file laid over them, `source` whose part counts.

    Raises UserError for a set, rule or field that does not exist, and for a file that is no YAML.
    """
    table = {name: dict(found["rules"]) for name, found in _read(FILE).items()}
    if overlay:
        given = _read(Path(overlay))
        own = given.pop(PER_SOURCE, None) or {}
        for name in [*given, *(name for rules in own.values() for name in rules or ())]:
            if name not in names:
                chosen = ",".join(names) or "none"
                raise UserError(f"{overlay} has rules of {name!r}, which is not among --filters {chosen}; add it there")
        _lay(table, given, overlay)
        if source is not None:
            _lay(table, own.get(source) or {}, overlay)
    for name in names:
        if name not in table:
            raise unknown("set of rules", name, table)
    return tuple(_rule(name, rule, said) for name in names for rule, said in table[name].items() if said is not None)


def sources_named(overlay: str | None) -> list[str]:
    """Return the sources that an overlay has rules of their own for."""
    return sorted(_read(Path(overlay)).get(PER_SOURCE) or {}) if overlay else []


def cited(name: str) -> str:
    """Return where the rules of a set were published, "" for a set of the user's own."""
    return str(_read(FILE).get(name, {}).get("source", ""))


def _lay(table: dict[str, dict[str, Any]], given: Mapping[str, Any], where: str) -> None:
    for name, rules in given.items():
        if not isinstance(rules, Mapping):
            raise UserError(f"{where}: {name} must be a mapping of rules, as in {FILE.name}")
        into = table.setdefault(name, {})
        for rule, said in rules.items():
            if said is not None and not isinstance(said, Mapping):
                raise UserError(f"{where}: {name}.{rule} must be a mapping as {{min: 50}}, or null to drop the rule")
            before = into.get(rule) or {}
            into[rule] = None if said is None else {**before, **said}


def _rule(name: str, rule: str, said: Mapping[str, Any]) -> Rule:
    known = {one.name for one in fields(Rule)} - {"set", "name"}
    for key in said:
        if key not in known:
            raise unknown(f"field of rule {name}.{rule}", str(key), known)
    if said.get("measure") not in MEASURES:
        raise unknown(f"measure of rule {name}.{rule}", str(said.get("measure")), MEASURES)
    for bound in ("min", "max", "above", "below"):
        value = said.get(bound)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"rule {name}.{rule}: {bound} must be a number, got {value!r}")
    return Rule(name, rule, **said)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the rules {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: rules are a mapping of sets, as in {FILE.name}")
    return found
