"""`align-kit data …`: what is done to a data set before anything trains on it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from align_kit.errors import unknown

USAGE = """usage: align-kit data clean <card:name | file> [...] --output folder
       align-kit data stats <card:name | file>
       align-kit data mix <source:share> [...] --output folder
       align-kit data preferences <card:name | file> [--output folder]

`align-kit data <command> --help` lists what each takes."""

# Imported when it is asked for.
COMMANDS = {
    "clean": "align_kit.clean.command:clean",
    "stats": "align_kit.clean.command:stats",
    "mix": "align_kit.clean.mixing:mix_command",
    "preferences": "align_kit.preferences.command:preferences",
}


def data(words: Sequence[str]) -> int:
    """Run one of the commands on data and return its exit code; raises UserError for one that does not exist."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if words[0] not in COMMANDS:
        raise unknown("command of align-kit data", words[0], COMMANDS)
    module, _, function = COMMANDS[words[0]].partition(":")
    return int(getattr(importlib.import_module(module), function)(list(words[1:])))
