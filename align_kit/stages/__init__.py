"""The stages of a run, in the order `run.execute` calls them; each knows one thing and no method's name."""

from align_kit.stages.beginning import Start, clear_home, open_home, starting_point, tokenizer
from align_kit.stages.data import rows
from align_kit.stages.engine import Engine, batch, process_group, repeats, shown, start
from align_kit.stages.models import forward, frozen, policy
from align_kit.stages.training import derived, trainer

__all__ = [
    "Engine",
    "Start",
    "batch",
    "clear_home",
    "derived",
    "forward",
    "frozen",
    "open_home",
    "policy",
    "process_group",
    "repeats",
    "rows",
    "shown",
    "start",
    "starting_point",
    "tokenizer",
    "trainer",
]
