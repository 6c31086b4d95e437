"""The stages of a run, in the order `run.execute` calls them; each knows one thing and no method's name."""

from align_kit.checkpoint.space import naming_a_full_disk
from align_kit.stages.beginning import Start, clear_home, reading_sources, starting_point, tokenizer
from align_kit.stages.contract import keep_data
from align_kit.stages.data import rows
from align_kit.stages.engine import Engine, batch, process_group, repeats, shown, start
from align_kit.stages.models import forward, frozen, policy
from align_kit.stages.other_world import cut_anew
from align_kit.stages.plan import Planned, planned, tell_meters
from align_kit.stages.reporting import of_a_failure
from align_kit.stages.resume import open_home
from align_kit.stages.samples import before_and_after
from align_kit.stages.saving import finish_copies
from align_kit.stages.training import derived, trainer

__all__ = [
    "Engine",
    "Planned",
    "Start",
    "batch",
    "before_and_after",
    "clear_home",
    "cut_anew",
    "derived",
    "finish_copies",
    "forward",
    "frozen",
    "keep_data",
    "naming_a_full_disk",
    "of_a_failure",
    "open_home",
    "planned",
    "policy",
    "process_group",
    "reading_sources",
    "repeats",
    "rows",
    "shown",
    "start",
    "starting_point",
    "tell_meters",
    "tokenizer",
    "trainer",
]
