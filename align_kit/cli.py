"""The command line: `align-kit dpo …` runs a recipe here, `align-kit launch dpo …` on several ranks."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from align_kit import __version__, log, registry
from align_kit.errors import EXIT_CODE, UserError, unknown

USAGE = """usage: align-kit <recipe> [--config a.yaml b.yaml ...] [--key value ...]
       align-kit launch [--nproc_per_node N] [--nnodes N ...] <recipe> [...]
       align-kit plan <recipe> [--gpu NAME --gpus N --nodes N] [--config a.yaml ...] [--key value ...]
       align-kit demo [--seed N]
       align-kit compare [<recipe>] [--vary key=a,b,c] [--seeds N] [--key value ...]
       align-kit report <run folder> [...] [--output page.html]
       align-kit check <recipe> [--config a.yaml ...] [--key value ...]
       align-kit show <recipe> [--rows N] [--config a.yaml ...] [--key value ...]
       align-kit doctor [--fix] [--json] [--ranks N]
       align-kit sample <model> <card:name | file> --output folder [--keep rejection|best-worst|majority ...]
       align-kit data clean|stats|mix|preferences [...]
       align-kit cards [check|update|croissant|table] [...]

recipes:
{recipes}

`align-kit <recipe> --help` lists every key; `--dry-run` prints what would run and stops."""


# What is no recipe; imported when it is asked for.
COMMANDS = {
    "launch": "align_kit.launch:launch",
    "plan": "align_kit.planner:planner",
    "demo": "align_kit.demo:demo",
    "compare": "align_kit.compare:compare",
    "report": "align_kit.report.overlay:report",
    "sample": "align_kit.sampling.command:sample",
    "data": "align_kit.data_commands:data",
    "check": "align_kit.check:check",
    "show": "align_kit.inspect.command:show",
    "doctor": "align_kit.doctor.command:doctor",
    "cards": "align_kit.card_commands:cards",
}


def usage() -> str:
    """Return the text of `align-kit --help`."""
    rows = "\n".join(f"  {recipe.name:<10} {recipe.summary}" for recipe in registry.RECIPES)
    return USAGE.format(recipes=rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"align-kit {__version__}")
        return 0
    try:
        return _command(words[0], words[1:])
    except UserError as error:
        if log.rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except BrokenPipeError:  # the reader has seen enough, as in `align-kit dpo --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _command(name: str, rest: list[str]) -> int:
    if name in registry.names():
        from align_kit.run import run

        return run(name, argv=rest)
    if name not in COMMANDS:
        raise unknown("command or recipe", name, [*registry.names(), *COMMANDS], show=20)
    module, _, function = COMMANDS[name].partition(":")
    return int(getattr(importlib.import_module(module), function)(rest))


if __name__ == "__main__":
    sys.exit(main())
