"""`align-kit launch`: several ranks of one recipe, watched, and started again from the last checkpoint when they die.

`options` reads the command line, `attempts` runs the ranks as often as it takes, `agent` starts them (torchrun's),
`watch` and `pulse` see who has ended or hangs, `signals` passes signals on, `judge` decides, `tell` says.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from align_kit import log, machine, registry
from align_kit.launch.options import OPTIONS, Options, parse, split

HELP = """usage: align-kit launch [--option value ...] <recipe> [the recipe's keys]

{options}

exit codes: 0 done; 2 a mistake to mend; 3 a fault that came back; 75 saved and stopped on request; 128 + n ended by
signal n; 1 anything else"""


def launch(argv: Sequence[str]) -> int:
    """Start the ranks of a recipe and return the exit code, see `HELP`.

    `argv` is `[--nproc_per_node N …] <recipe> [the recipe's own words]`. Raises `UserError` for an option it
    does not know.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    given, recipe, rest = split(argv)
    registry.get(recipe)
    options = parse(given)
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(options)))
    log.quiet()
    return start(options, ["-m", "align_kit", recipe, *rest])


def start(options: Options, command: Sequence[str]) -> int:
    """Run `command` (words after the interpreter) on every rank of this machine; return the exit code."""
    from align_kit.launch.attempts import supervise

    try:
        return supervise(options, command)
    except KeyboardInterrupt:  # before any rank ran
        return 128 + signal.SIGINT


def help_text() -> str:
    """Return the table of options."""
    lines = [f"  --{name:<16} {what}" for name, what in OPTIONS.items()]
    return HELP.format(options="\n".join(lines))


def _threads(options: Options) -> int:
    return max(1, machine.cores() // options.ranks)
