"""The stages of a run, in the order `run.execute` calls them; each knows one thing and no method's name."""

from align_kit.checkpoint.space import naming_a_full_disk
from align_kit.stages.beginning import Start, clear_home, reading_sources, starting_point, tokenizer
from align_kit.stages.contract import keep_data
from align_kit.stages.data import rows
from align_kit.stages.engine import Engine, batch, process_group, repeats, shown, start
from align_kit.stages.models import forward, frozen, policy
from align_kit.stages.other_world import cut_anew
from align_kit.stages.resume import open_home
from align_kit.stages.saving import finish_copies
from align_kit.stages.training import derived, trainer

__all__ = [
    "Engine",
    "Start",
    "batch",
    "clear_home",
    "cut_anew",
    "derived",
    "finish_copies",
    "forward",
    "frozen",
    "keep_data",
    "naming_a_full_disk",
    "open_home",
    "policy",
    "process_group",
    "reading_sources",
    "repeats",
    "rows",
    "shown",
    "start",
    "starting_point",
    "tokenizer",
    "trainer",
]
