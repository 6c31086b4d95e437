"""Run real recipes on real ranks in seconds: forks of one warm process, gloo between them, DeepSpeed inside."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Ports of runs, below those the kernel gives out by itself: what it has just given to one it may give to another.
PORTS, PORTS_EACH = 20_000, 2_000


@dataclass
class Result:
    """What ranks left: exit codes, what each printed, seconds of wall time."""

    codes: list[int]
    output: list[str]
    seconds: float

    @property
    def text(self) -> str:
        return "".join(self.output)

    def ok(self) -> Result:
        """Return itself, or fail with what the ranks printed."""
        assert set(self.codes) == {0}, f"exit codes {self.codes}\n{self.text}"
        return self

    def error(self, code: int = 2) -> str:
        """Return the one `error:` line of a user's mistake; fail where there is not exactly one, or a traceback.

        `code` is how the rank ended that says it: 3 after a fault.
        """
        lines = [line for line in self.text.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.text and code in self.codes, f"{self.codes}\n{self.text}"
        return lines[0]


def is_free(port: int) -> bool:
    """Tell whether nobody listens on a TCP port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class Ranks:
    """The warm process and the runs made from it. `home` keeps their logs, caches and extensions."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.count = 0
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        first = PORTS + PORTS_EACH * (worker % 4)
        self.ports = itertools.cycle(range(first, first + PORTS_EACH))
        for _ in range(os.getpid() % PORTS_EACH):  # another suite on this machine begins elsewhere
            next(self.ports)
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": str(home / "extensions"),
            "HF_HUB_OFFLINE": "1",
            "ALIGN_KIT_CACHE": str(home / "cache"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            env.pop(name, None)
        self.env = env
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=ROOT,
        )
        self.ready = False

    def run(
        self,
        *argv: str | Path,
        world_size: int = 2,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        function: str = "",
        ranked: bool = True,
        timeout: float = 300,
        grace: float = 5,
        **kwargs: Any,
    ) -> Result:
        """Run `align-kit argv…`, or `function(**kwargs)` (dotted path), on `world_size` forked ranks."""
        self.count += 1
        log = self.home / f"run{self.count}"
        request = {
            "argv": [str(word) for word in argv],
            "world_size": world_size,
            "env": env or {},
            "cwd": str(cwd or self.home),
            "function": function,
            "kwargs": kwargs,
            "log": str(log),
            "port": next(filter(is_free, self.ports)),
            "ranked": ranked,
            "timeout": timeout,
            "grace": grace,
        }
        answer = self._ask(request)
        output = [Path(f"{log}.{rank}").read_text(errors="replace") for rank in range(world_size)]
        return Result(answer["codes"], output, answer["seconds"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        if not self.ready:
            json.loads(self.process.stdout.readline())
            self.ready = True
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End the warm process; its ranks have ended before."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)
