"""The table of checks: what is looked at, in the order it is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from align_kit.doctor import given, gpu, network, ranks, storage, system, versions
from align_kit.doctor.finding import Check
from align_kit.doctor.ranks import Group
from align_kit.resources import folder
from align_kit.run_folder import cache_folder


def checks(environ: Mapping[str, str], group: Group) -> list[Check]:
    """Return all checks of this machine; `environ` is the user's own, `group` the ranks that have been started.

    What loads much comes last, so that the first lines are there at once and the ranks start meanwhile.
    """
    import torch

    gpus = torch.cuda.device_count()
    here = group.here
    return [
        Check("python", versions.python),
        Check("packages", versions.ranges),
        Check("as tested", versions.tested),
        Check("requirements", versions.declared),
        Check("known bad pairs", versions.pairs),
        Check("copies", versions.copies),
        Check("kernel", system.kernel),
        Check("text", system.text),
        Check("memory", partial(system.memory, here)),
        Check("cores", partial(system.cores, environ, here)),
        Check("huge pages", system.huge_pages),
        Check("open files", system.open_files),
        Check("threads", partial(system.threads, here)),
        Check("core dumps", system.core_dumps),
        *_gpu_checks(environ, gpus),
        Check("shared memory", partial(storage.shared_memory, gpus)),
        *_folder_checks(environ),
        Check("disk speed", partial(storage.speed, Path("runs"))),
        Check("build locks", partial(storage.locks, environ)),
        Check("compiler", gpu.compiler),
        Check("variables", partial(network.variables, environ)),
        Check("host name", partial(network.hostname, environ)),
        Check("port", network.port),
        Check("data", partial(given.data, environ)),
        Check("hub", given.hub),
        Check("wandb", partial(given.wandb, environ)),
        *(Check("ds_configs", partial(given.engine_configs, place, gpu=gpus > 0)) for place in _config_folders()),
        Check("all-reduce", partial(ranks.all_reduce, group)),
        Check("clocks", partial(ranks.clocks, group)),
    ]


def _gpu_checks(environ: Mapping[str, str], gpus: int) -> Iterator[Check]:
    yield Check("device", partial(gpu.device, environ))
    if gpus:
        yield Check("kernels", gpu.kernels)
        yield Check("gpu memory", partial(gpu.room, environ))
        yield Check("gpu links", gpu.links)


def _folder_checks(environ: Mapping[str, str]) -> Iterator[Check]:
    """Yield a check for each folder that runs write to; one that a variable names is expected to be there."""
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = (
        ("cache", cache_folder(environ), "ALIGN_KIT_CACHE"),
        ("extensions", Path(environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions"), "TORCH_EXTENSIONS_DIR"),
        ("hub's cache", Path(environ.get("HF_HOME") or cache / "huggingface"), "HF_HOME"),
        ("temporary files", Path(environ.get("TMPDIR") or "/tmp"), "TMPDIR"),
    )
    yield Check("runs", partial(storage.writable, Path("runs"), checkpoints=True))
    for name, place, variable in places:
        yield Check(name, partial(storage.writable, place, variable if environ.get(variable) else ""))


def _config_folders() -> list[Path]:
    """Return the folders of engine configurations: `./ds_configs`, and the packaged one where that is another."""
    shipped, own = folder("ds_configs"), Path("ds_configs")
    return [shipped] if not own.is_dir() or own.resolve() == shipped.resolve() else [own, shipped]
