"""torchrun's elastic agent, which starts an attempt's ranks; our watch decides when the attempt is over."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from align_kit.errors import UserError
from align_kit.launch.options import Options
from align_kit.launch.signals import Signals
from align_kit.launch.watch import Watch

LOOK_SECONDS = 0.1
JOIN_SECONDS = 600  # for the launchers of all machines to meet


class Agent(LocalElasticAgent):
    """Starts the ranks of one attempt and keeps them until none runs: whoever is late or left behind, `watch` ends.

    torch's own way ends the others with SIGTERM as soon as one rank has failed: in the middle of a save, and before
    they can say how they ended.
    """

    def __init__(self, options: Options, command: Sequence[str], attempt: int, watch: Watch, signals: Signals) -> None:
        self.watch, self.signals, self.alone = watch, signals, options.nodes == 1
        port = options.port_of(attempt)
        spec = WorkerSpec(
            role="default",
            local_world_size=options.ranks,
            entrypoint=sys.executable,
            args=tuple(command),
            rdzv_handler=StaticTCPRendezvous(
                options.address, port, options.node, options.nodes, f"align_kit.{attempt}", JOIN_SECONDS
            ),
            max_restarts=0,
            monitor_interval=LOOK_SECONDS,
            master_addr=options.address,
            master_port=port,
        )
        # The first rank speaks, so its output goes where ours does; the others' is shown where one of them fails.
        others = dict.fromkeys(range(1, options.ranks), Std.ALL)
        super().__init__(spec, DefaultLogsSpecs(str(watch.folder / "output"), redirects=others))

    def start(self) -> None:
        """Start the ranks and return when all have ended; `watch` knows how."""
        for module in ("multiprocessing.api", "agent.server.api", "agent.server.local_elastic_agent"):
            # what they say of a rank that failed, we say
            logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.CRITICAL)
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are ours
        try:
            self.run()
        finally:
            self._close_output()

    def _close_output(self) -> None:
        """Close the files that ranks wrote to, of which torch leaves one pair a rank and attempt open."""
        context: Any = self._pcontext
        for handler in context.subprocess_handlers.values() if context else ():
            for stream in (handler._stdout, handler._stderr):
                if stream is not None:
                    stream.close()

    def written_by(self, rank: int) -> Path | None:
        """Return the file with what a rank wrote to standard error, `None` where it went to ours."""
        ids = [worker.global_rank for worker in self._worker_group.workers]
        if rank not in ids or self._pcontext is None:
            return None
        place = self._pcontext.stderrs[ids.index(rank)]
        return Path(place) if place else None

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        spec = worker_group.spec
        try:
            # Where machines wait for each other no rank runs, and it may take long: there a signal ends the launcher.
            with nullcontext() if self.alone else self.signals.as_before():
                super()._rendezvous(worker_group)
        except DistError as error:
            reason = str(error).splitlines()[0][:300]
            raise UserError(
                f"the launchers did not meet at {spec.master_addr}:{spec.master_port} ({reason}); start one on each "
                "machine with the same --nnodes, --master_addr and --master_port, a port that is free on machine 0"
            ) from None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        context: Any = self._pcontext
        self.watch.begin({w.global_rank: context.subprocess_handlers[w.local_rank].proc for w in worker_group.workers})
        self.signals.take_over(self.watch)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self.watch.look():
            return RunResult(state=WorkerState.HEALTHY)
        result: RunResult = super()._monitor_workers(worker_group)
        return result
