"""Python and the packages: are they what align_kit asks for, what it was tested with, and what works together?"""

from __future__ import annotations

import configparser
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from align_kit import machine
from align_kit.doctor.finding import BAD, NOTE, WARN, Finding, ok
from align_kit.resources import PACKAGE

DISTRIBUTION = "align-kit"
CHECKOUT = PACKAGE.parent
SHOWN = 4  # of a long list


@dataclass(frozen=True)
class Pair:
    """Versions that are known not to work together, each within its range, and how that was found."""

    versions: Mapping[str, str]
    state: str
    what: str
    remedy: str
    source: str


PAIRS = (
    Pair(
        {"deepspeed": "<0.19.8", "peft": ""},
        WARN,
        "LoRA under ZeRO-3 with gradient_checkpointing fails in the backward pass (frozen parameters have shape [0])",
        "pip install 'deepspeed>=0.19.8', or gradient_checkpointing_kwargs: {use_reentrant: true}",
        "https://github.com/deepspeedai/DeepSpeed/pull/8148; it works with 0.19.8 here",
    ),
    Pair(
        {"torch": "==2.13.*", "accelerate": "<1.16"},
        NOTE,
        "ranks that `accelerate launch --max_restarts` starts again do not find each other (gloo)",
        "use `align-kit launch`, which restarts runs itself",
        "seen with torch 2.13.0 and accelerate 1.15.0: new ranks read dead addresses from the store that is used again",
    ),
    Pair(
        {"llmcompressor": "", "transformers": ""},
        WARN,
        "llmcompressor asks for an older transformers, and pip takes the newer one away",
        "keep llmcompressor in an environment of its own",
        "seen when it was installed beside transformers 5.23.0",
    ),
)


def python() -> Finding:
    """Is this a Python that align_kit runs on?"""
    from packaging.specifiers import SpecifierSet

    asked, found = required_python(), platform.python_version()
    if asked and not SpecifierSet(asked).contains(found, prereleases=True):
        return Finding(BAD, found, f"align_kit asks for {asked}")
    return ok(f"{found} in {sys.prefix}")


def ranges() -> Finding:
    """Is everything here that align_kit asks for, in a version that will do?"""
    missing, other = [], []
    for name, asked in required().items():
        found = version(name)
        if found is None:
            missing.append(f"{name}{asked}")
        elif not _within(found, asked):
            other.append(f"{name} {found} (asked: {asked})")
    said = "; ".join([*(["missing: " + ", ".join(missing)] if missing else []), *other])
    if said:
        words = " ".join(f"'{name}{asked}'" for name, asked in required().items() if not _will_do(name, asked))
        return Finding(BAD, said, f"pip install {words}")
    return ok(", ".join(f"{name} {version(name)}" for name in machine.STACK))


def _will_do(name: str, asked: str) -> bool:
    found = version(name)
    return found is not None and _within(found, asked)


def tested(file: Path | None = None) -> Finding:
    """Are the packages those that align_kit was tested with? `file` holds its pins; the checkout's by default."""
    file = file or CHECKOUT / "constraints.txt"
    if not file.is_file() or not _is_checkout():
        return Finding(NOTE, "no constraints.txt: it comes with the checkout, not with the package")
    pins = dict(_pins(file.read_text(encoding="utf-8")))
    other = {name: found for name, pin in pins.items() if (found := version(name)) and _public(found) != pin}
    if not other:
        return ok(f"all {sum(version(name) is not None for name in pins)} installed are those of constraints.txt")
    names = sorted(other, key=lambda name: (name not in machine.STACK, name))
    said = ", ".join(f"{name} {other[name]} ({pins[name]})" for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    state = WARN if set(names) & set(machine.STACK) else NOTE
    what = f"other than what was tested (in brackets): {said}{more}"
    return Finding(state, what, "pip install -c constraints.txt -e . brings those")


def pairs() -> Finding:
    """Are there versions that are known not to work together?"""
    met = [pair for pair in PAIRS if all(_met(name, asked) for name, asked in pair.versions.items())]
    if not met:
        return ok(f"none of the {len(PAIRS)} known")
    state = WARN if any(pair.state == WARN for pair in met) else NOTE
    return Finding(state, "; ".join(_told(pair) for pair in met))


def _told(pair: Pair) -> str:
    names = " and ".join(f"{name} {version(name)}" for name in pair.versions)
    return f"{names}: {pair.what} ({pair.remedy})"


def _met(name: str, asked: str) -> bool:
    found = version(name)
    return found is not None and _within(found, asked)


def copies() -> Finding:
    """Is each package here once? Of two copies the first on the path is imported, whatever pip says."""
    twice = {
        name: [str(copy.locate_file("")) for copy in found]
        for name in (DISTRIBUTION, *machine.STACK)
        if len(found := _distinct(name)) > 1
    }
    if not twice:
        return ok("one of each package")
    said = "; ".join(f"{name} in {', '.join(places)}" for name, places in twice.items())
    return Finding(WARN, f"twice: {said}", "the first is imported: uninstall one, or mend PYTHONPATH")


def _distinct(name: str) -> list[metadata.Distribution]:
    """Return the installed copies of a package; the data that setuptools leaves in a checkout is none."""
    found = {
        str(Path(str(copy.locate_file(""))).resolve()): copy
        for copy in metadata.distributions(name=name)
        if ".egg-info" not in str(getattr(copy, "_path", ""))
    }
    return list(found.values())


def declared() -> Finding:
    """Do the packages of the stack have what they ask for themselves?"""
    from packaging.requirements import Requirement

    wrong = []
    for name in machine.STACK:
        for text in (metadata.requires(name) or []) if version(name) else []:
            needs = Requirement(text)
            if needs.marker is not None and not needs.marker.evaluate({"extra": ""}):
                continue
            found = version(needs.name)
            if found is None or not _within(found, str(needs.specifier)):
                wrong.append(f"{name} asks for {needs.name}{needs.specifier}, {found or 'nothing'} is here")
    if wrong:
        return Finding(BAD, "; ".join(wrong), "pip install -c constraints.txt -e . mends it; `pip check` lists all")
    return ok("the stack has what it asks for")


# --- what is asked for ------------------------------------------------------------------------------------------------


def required() -> dict[str, str]:
    """Return the packages that align_kit asks for and their ranges: the checkout's, else the installed package's.

    An editable install remembers what the checkout asked for when it was installed.
    """
    from packaging.requirements import Requirement

    lines = _setup().get("options", "install_requires", fallback="").splitlines() if _is_checkout() else None
    needs = [Requirement(line) for line in (lines or metadata.requires(DISTRIBUTION) or []) if line.strip()]
    return {each.name: str(each.specifier) for each in needs if each.marker is None}


def required_python() -> str:
    """Return the range of Pythons that align_kit runs on."""
    if _is_checkout():
        return _setup().get("options", "python_requires", fallback="")
    return metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""


def _is_checkout() -> bool:
    return (CHECKOUT / "setup.cfg").is_file() and _setup().get("metadata", "name", fallback="") == DISTRIBUTION


def _setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(CHECKOUT / "setup.cfg", encoding="utf-8")
    return parser


def _pins(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, found, pin = line.partition("#")[0].strip().partition("==")
        if found:
            yield name.strip(), pin.strip()


def version(name: str) -> str | None:
    """Return the version of an installed package, `None` where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _within(found: str, asked: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(asked).contains(found, prereleases=True)


def _public(found: str) -> str:
    """Return a version without its build: `2.13.0+cpu` is torch 2.13.0."""
    return found.partition("+")[0]
