"""Where a model's weights come from, resolved once to a local folder, and their content digest."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align_kit.errors import UserError
from align_kit.models.remembered import remembered
from align_kit.resources import PACKAGE

BUILTIN = "builtin:"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
WORD_FILES = ("*.json", "*.model", "*.txt", "*.jinja")  # all that a model is but its weights
WEIGHT_FILES = ("*.safetensors", *WORD_FILES)


@dataclass(frozen=True)
class Source:
    """Weights in a local folder, or random ones drawn from a configuration.

    `name` is what the user gave, `folder` the local folder behind it, `random` says that only the configuration
    there is used, `base` is the model an adapter in `folder` was trained on.
    """

    name: str
    folder: Path
    random: bool = False
    base: Source | None = None

    @property
    def reference(self) -> str:
        """What another folder can find this one by: the hub id, or the absolute path."""
        return str(self.folder.resolve()) if Path(self.name).expanduser().is_dir() else self.name

    @property
    def is_adapter(self) -> bool:
        return self.base is not None

    @property
    def weights(self) -> Source:
        """The source of the full weights: the base where this is an adapter."""
        return self.base or self

    @property
    def head(self) -> Literal["lm", "score"]:
        """What the stored model ends in: "score" where it is a sequence classifier or the adapter of one."""
        if self.is_adapter:
            task = json.loads((self.folder / "adapter_config.json").read_text()).get("task_type")
            return "score" if task == "SEQ_CLS" else "lm"
        names = json.loads((self.folder / "config.json").read_text()).get("architectures") or []
        return "score" if any(name.endswith("ForSequenceClassification") for name in names) else "lm"


def resolve(
    name: str, *, revision: str | None = None, random: bool = False, option: str = "model_name_or_path"
) -> Source:
    """Return the source behind a local folder, a hub id or `builtin:tiny`.

    Raises `UserError` (naming `option`) where there is nothing to load.
    """
    folder = _local_folder(name, revision, option)
    if random:
        return Source(name, folder, random=True)
    if (folder / "adapter_config.json").is_file():
        if not (folder / "adapter_model.safetensors").is_file():
            raise UserError(f"{option} {name!r} is an adapter without adapter_model.safetensors; convert it")
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        return Source(name, folder, base=resolve(base, option=f"the base of the adapter {name}"))
    if not any(folder.glob("*.safetensors")):
        raise UserError(_no_weights(name, folder, option))
    return Source(name, folder)


def configuration(name: str, *, revision: str | None = None, option: str = "model_name_or_path") -> Source:
    """Return the source behind a model of which no more than the configuration need be here; no weights are fetched.

    Raises `UserError` (naming `option`) where there is no configuration.
    """
    folder = _local_folder(name, revision, option, WORD_FILES)
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        return Source(name, folder, base=configuration(base, option=f"the base of the adapter {name}"))
    if not (folder / "config.json").is_file():
        raise UserError(f"{option} {name!r}: no config.json in that folder")
    return Source(name, folder, random=not any(folder.glob("*.safetensors")))


def check_scores(source: Source, option: str) -> None:
    """Raise `UserError` where `source`, which `option` names, does not end in a score."""
    if source.head != "score":
        raise UserError(
            f"{option} {source.name} is no sequence classifier; give one with one label, such as the folder of a "
            "finished reward run"
        )


def _local_folder(name: str, revision: str | None, option: str, files: Sequence[str] = WEIGHT_FILES) -> Path:
    if name.startswith(BUILTIN):
        folder = PACKAGE / "data" / "embedded" / name.removeprefix(BUILTIN)
        if not (folder / "config.json").is_file():
            raise UserError(f"{option} {name!r}: no such built-in model; known: builtin:tiny")
        return folder
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{option} {name!r} is a file; give the folder that holds config.json and *.safetensors")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.parent.is_dir():
        raise UserError(f"{option} {name!r}: no such folder{_nearest(path)}; give a folder or a hub id")
    return _from_hub(name, revision, option, files)


def _nearest(path: Path) -> str:
    siblings = [str(p) for p in path.parent.glob("*") if p.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), siblings, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _from_hub(name: str, revision: str | None, option: str, files: Sequence[str]) -> Path:
    """Return the local snapshot of a hub model, `files` of it downloaded once."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{option} {name!r}: neither a folder here nor to be had from the hub ({reason[:160]}); "
            "give a local folder, or `--config_name builtin:tiny` for the embedded model"
        ) from None


def _no_weights(name: str, folder: Path, option: str) -> str:
    if any(folder.glob("*.bin")):
        return f"{option} {name!r} holds *.bin (pickled) weights only; convert them to safetensors"
    if (folder / "config.json").is_file():
        return (
            f"{option} {name!r} holds a configuration but no *.safetensors; for random weights use --config_name {name}"
        )
    return f"{option} {name!r}: no config.json and *.safetensors in that folder"


# --- identity ---------------------------------------------------------------------------------------------


def digest(source: Source, *, seed: int = 0) -> str:
    """Return the content digest of the weights: names, dtypes, shapes and bytes, whatever the files are called.

    Random weights are identified by their configuration and `seed`; an adapter by itself and its base.
    A fast hash (xxh3-128) for integrity, not for security; what was computed for the same files is `remembered`.
    """
    import xxhash

    if source.random:
        state = xxhash.xxh3_128((source.folder / "config.json").read_bytes() + str(seed).encode())
        return f"random-{state.hexdigest()}"
    base = digest(source.base) if source.base is not None else ""
    files = source.folder.glob("*.safetensors")
    return remembered("tensors", files, base, lambda: _digest_of_tensors(source.folder, base))


def _digest_of_tensors(folder: Path, base: str) -> str:
    import xxhash

    state = xxhash.xxh3_128()
    for name, header, blob in _tensors(folder):
        state.update(name.encode() + header.encode())
        state.update(blob)
    state.update(base.encode())
    return str(state.hexdigest())


def _tensors(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """Yield (name, dtype and shape, bytes) of every stored tensor in name order, without copying it."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        start, header = _header(file)
        found += [(name, entry, file, start) for name, entry in header.items()]
    views = {file: _mapped(file) for file in {place[2] for place in found}}
    for name, entry, file, start in sorted(found, key=lambda item: item[0]):
        low, high = entry["data_offsets"]
        yield name, f"{entry['dtype']}{entry['shape']}", views[file][start + low : start + high]


def shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in safetensors files, by name; their headers alone are read."""
    return {name: tuple(entry["shape"]) for file in files for name, entry in _header(file)[1].items()}


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return where the tensors of a safetensors file begin, and its entries by tensor name; the file must be whole."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = dict(json.loads(stream.read(min(length, MAX_HEADER))))
            header.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, OverflowError):
            raise UserError(f"{file} is no safetensors file; copy or download it again") from None
    if file.stat().st_size != end:
        raise UserError(f"{file} has {file.stat().st_size} bytes, its header says {end}; copy or download it again")
    return 8 + length, header


def _mapped(file: Path) -> memoryview:
    import mmap

    with file.open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
