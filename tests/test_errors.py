"""What a user's mistake costs: one line on one rank, exit code 2, and nothing is left running."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from align_kit import failures
from tests.harness import Ranks, Result
from tests.little import ROWS, TWO_STEPS, little_run, strangers, write_rows

Words = list[str | Path]
PAIR = ROWS["dpo"]
ACCELERATE = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def refused(done: Result, message: str) -> None:
    """Check that all ranks together left one line, `message`, and ended by themselves with exit code 2."""
    line = done.error()
    assert re.search(message, line), line
    assert set(done.codes) == {2}, f"a rank did not end by itself: {done.codes}"
    spoken = [text for text in strangers(done.text) if not text.startswith(("align_kit ", "  "))]
    assert spoken == [line], done.text


def on(*entries: object) -> tuple[str, str]:
    return "--datasets", json.dumps(list(entries))


def rows(path: str, **changes: object) -> dict[str, object]:
    return {"path": path, **changes}


# --- the table --------------------------------------------------------------------------------------------

# name: (words after `dpo`, message). The folder holds what `folder` below puts there.
TABLE: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown key": (
        ("--lerning_rate", "3"),
        r"lerning_rate \(command line\) is an unknown key \(did you mean 'learning_rate'",
    ),
    "unknown key in YAML": (("--config", "key.yaml"), r"betta \(key.yaml:1\) is an unknown key \(did you mean 'beta'"),
    "wrong value": (("--max_steps", "many"), r"max_steps \(command line\) .*many"),
    "unknown card": (on(rows("card:sums_pair")), r"unknown card 'sums_pair'; .*did you mean 'sums_pairs'"),
    "unknown ds_config": (
        ("--deepspeed", "zero33"),
        r"unknown ds_config 'zero33'; known: zero2, .*did you mean 'zero3",
    ),
    "unreadable YAML": (("--config", "bad.yaml"), r"bad.yaml:2 is not valid YAML"),
    "missing YAML": (("--config", "recipes/dp0.yaml"), r"no such configuration file: recipes/dp0.yaml"),
    "empty data set": (on(rows("empty.jsonl")), r"empty.jsonl.*no rows"),
    "missing data file": (on(rows("nothing.jsonl")), r"nothing.jsonl"),
    "missing column": (
        on(rows("good.jsonl", columns={"prompt": "prompt", "chosen": "choosen", "rejected": "rejected"})),
        r"good.jsonl, line 1: no column 'choosen'; found prompt, chosen, rejected \(did you mean 'chosen'\?\)",
    ),
    "unknown columns": (on(rows("strange.jsonl")), r"cannot recognise rows with the columns bad, good, question"),
    "another phase's rows": (on(rows("card:sums_sft")), r"sums_sft.*preference"),
    "batch does not divide": (
        ("--global_batch_size", "7"),
        r"global_batch_size=7 does not divide into 2 per rank x 2 ranks = 4; use global_batch_size 4 or 8",
    ),
    "more ranks than rows": (on(rows("one.jsonl")), r"1 training row for 2 ranks; every rank needs at least one"),
    "folder below a file": (
        ("--output_dir", "good.jsonl/out"),
        r"output_dir good.jsonl/out cannot be written \(Not a directory\); name another with --output_dir",
    ),
    "folder of something else": (
        ("--output_dir", "photos", "--overwrite"),
        r"output_dir photos is not empty and holds no run of align_kit; remove it yourself",
    ),
    "resume nothing": (("--resume",), r"--resume: out holds no checkpoint to go on from; start without --resume"),
    "resume a wrong path": (("--resume", "photos"), r"--resume photos: no checkpoint's name; give"),
    "resume and overwrite": (("--resume", "--overwrite"), r"resume .* and overwrite .* were both given; drop one"),
    "unknown tokenizer": (("--tokenizer_name", "./no"), r"tokenizer_name './no': no such folder"),
    "no such configuration": (("--config_name", "builtin:tony"), r"'builtin:tony': no such built-in model"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the files the table speaks of."""
    place = tmp_path_factory.mktemp("errors")
    write_rows(place / "good.jsonl", [PAIR] * 8)
    write_rows(place / "one.jsonl", [PAIR])
    write_rows(place / "empty.jsonl", [])
    write_rows(place / "strange.jsonl", [{"question": "a", "good": "b", "bad": "c"}] * 8)
    (place / "bad.yaml").write_text("max_steps: [1\nbeta: 2\n")
    (place / "key.yaml").write_text("betta: 0.1\n")
    (place / "photos").mkdir()
    (place / "photos" / "sea.jpg").touch()
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_one_line_on_one_rank(name: str, ranks: Ranks, folder: Path) -> None:
    words, message = TABLE[name]
    data = () if "--datasets" in words else on(rows("good.jsonl"))
    refused(ranks.run("dpo", *TWO_STEPS, *data, *words, cwd=folder), message)
    assert not list(folder.glob("out/*")), "nothing was written"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dp0"], r"unknown command or recipe 'dp0'; known: .*dpo.* \(did you mean 'dpo'\?\)"),
        (["dpo", "--model_name_or_path", "./nowhere"], r"'./nowhere': no such folder; give a folder or a hub id"),
        (["dpo", "--model_name_or_path", "some/model"], r"'some/model': neither a folder here nor .*builtin:tiny"),
        (["sft", "--eos_token", "<no>", *TWO_STEPS], r"eos_token '<no>' is not in the vocabulary of builtin:tiny"),
        (["sft", "--beta", "0.1"], r"beta \(command line\) is not a key of sft; it belongs to dpo"),
    ],
)
def test_more_words_that_mean_nothing(words: Words, message: str, ranks: Ranks, folder: Path) -> None:
    refused(ranks.run(*words, cwd=folder), message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, r"RANK is set .* without WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start ranks by align-kit"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            r"RANK=2 is no rank of WORLD_SIZE=2",
        ),
    ],
)
def test_half_a_launcher(env: dict[str, str], message: str, ranks: Ranks, folder: Path) -> None:
    refused(ranks.run("dpo", "--dry-run", cwd=folder, world_size=1, ranked=False, env=env), message)


@pytest.mark.slow
def test_a_launch_file_of_another_stage(ranks: Ranks, folder: Path) -> None:
    done = ranks.run("dpo", "--deepspeed", "zero3", cwd=folder, env=ACCELERATE)
    refused(done, r"launch file asks for ZeRO stage 2 and the run's configuration \(zero3\) for stage 3; give the run")


@pytest.mark.slow
def test_a_mistake_without_other_ranks(ranks: Ranks, folder: Path) -> None:
    done = ranks.run("dpo", "--output_dir", "good.jsonl/x", cwd=folder, world_size=1, ranked=False)
    refused(done, "cannot be written")


# --- stale locks ------------------------------------------------------------------------------------------


def lock_of(extension: str, place: Path) -> dict[str, str]:
    """Leave the lock of a build that nobody works on and return the environment it stands in."""
    (place / "extensions" / extension).mkdir(parents=True)
    (place / "extensions" / extension / "lock").touch()
    return {"TORCH_EXTENSIONS_DIR": str(place / "extensions")}


@pytest.mark.slow
def test_a_stale_lock_in_the_way_is_named(ranks: Ranks, tmp_path: Path) -> None:
    from align_kit import zero

    engine = {**zero.load("zero3_offload"), "zero_force_ds_cpu_optimizer": True}
    (tmp_path / "adam.json").write_text(json.dumps(engine))
    words = little_run("dpo", tmp_path, "--deepspeed", "adam.json")
    done = ranks.run(*words, cwd=tmp_path, env=lock_of("cpu_adam", tmp_path))
    refused(done, r"cpu_adam/lock is the lock of a just-in-time build that no longer runs; remove the file, or the")


@pytest.mark.slow
def test_a_stale_lock_out_of_the_way_is_a_warning(ranks: Ranks, tmp_path: Path) -> None:
    words = little_run("dpo", tmp_path, "--dry-run")
    done = ranks.run(*words, cwd=tmp_path, env=lock_of("cpu_adam", tmp_path)).ok()
    (warning,) = [line for line in done.text.splitlines() if line.startswith("warning: ")]
    assert warning.endswith("cpu_adam/lock is the lock of a just-in-time build that no longer runs; remove the file")


# --- what is there already, and the wrong reference -------------------------------------------------------


@pytest.fixture(scope="module")
def trained(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished DPO run and its checkpoint (`first`) and a LoRA run on top of it (`adapter`)."""
    place = tmp_path_factory.mktemp("trained")
    saving = ("--save_strategy", "steps", "--save_steps", "1", "--warmup_steps", "0", "--learning_rate", "1e-2")
    ranks.run(*little_run("dpo", place, "--output_dir", "first", *saving), cwd=place).ok()
    lora = ("--output_dir", "adapter", "--model_name_or_path", "first", "--config_name", "null", "--use_peft")
    ranks.run(*little_run("sft", place, *lora, "--max_steps", "1"), cwd=place).ok()
    return place


def from_first(place: Path, *more: str) -> Words:
    """Return a DPO run that starts from the finished one."""
    return little_run("dpo", place, "--config_name", "null", "--model_name_or_path", "first", *more)


@pytest.mark.slow
def test_the_rule_for_a_folder_that_is_not_empty(ranks: Ranks, trained: Path) -> None:
    words = little_run("dpo", trained, "--output_dir", "again", "--max_steps", "1")
    ranks.run(*words, cwd=trained).ok()
    before = (trained / "again" / "manifest.json").read_text()
    refused(
        ranks.run(*words, cwd=trained),
        r"output_dir again is not empty; go on with --resume, replace it with --overwrite, or name another",
    )
    assert (trained / "again" / "manifest.json").read_text() == before
    (trained / "again" / "checkpoint-99").mkdir()
    ranks.run(*words, "--overwrite", cwd=trained).ok()
    assert not (trained / "again" / "checkpoint-99").exists(), "nothing of the old run is left"


@pytest.mark.slow
def test_a_checkpoint_does_not_become_its_own_reference(ranks: Ranks, trained: Path) -> None:
    words = from_first(trained, "--model_name_or_path", "first/checkpoint-1")
    refused(
        ranks.run(*words, cwd=trained),
        r"first/checkpoint-1 is a checkpoint of a dpo run whose reference is builtin:tiny; to go on .*--resume",
    )


@pytest.mark.slow
def test_another_model_as_reference(ranks: Ranks, trained: Path) -> None:
    words = from_first(trained, "--reference_model_name_or_path", "first/checkpoint-1", "--output_dir", "other")
    refused(
        ranks.run(*words, cwd=trained),
        r"the reference first/checkpoint-1 \(digest \w+\) is not what the policy starts from \(first, \w+\); drop",
    )
    done = ranks.run(*words, "--reference_differs", "--overwrite", cwd=trained).ok()
    reference = json.loads((trained / "other" / "manifest.json").read_text())["frozen"]["reference"]
    assert reference["differs"] and reference["name"] == "first/checkpoint-1" and "first/checkpoint-1" in done.text


@pytest.mark.slow
def test_a_reference_with_other_weights_under_the_same_identity(ranks: Ranks, trained: Path) -> None:
    """The digest says it is the policy's start, the weights in memory are others: the gate before the first step."""
    words = little_run("dpo", trained, "--config_name", "null", "--model_name_or_path", "adapter", "--use_peft")
    function = "tests.rank_faults:run_with_changed_reference"
    done = ranks.run(cwd=trained, function=function, words=[str(word) for word in words])
    refused(done, r"step-0 identity failed: .*log-ratio to its reference is up to [\d.]+, not 0; .* \(adapter, digest")


# --- memory, bugs, ranks that die -------------------------------------------------------------------------


@pytest.mark.slow
def test_out_of_memory_names_the_next_smaller_micro_batch(ranks: Ranks, tmp_path: Path) -> None:
    """The logits of a whole batch are too many; packed rows hold a chunk of them, and the same batch fits."""
    large = ("--max_steps", "1", "--per_device_train_batch_size", "64", "--config_overrides", '{"vocab_size": 50000}')

    def run(forward: str) -> Result:
        words = [str(word) for word in little_run("pretrain", tmp_path, *large, "--forward", forward, rows=64)]
        return ranks.run(cwd=tmp_path, function="tests.rank_faults:run_in_little_memory", words=words, spare_mib=1250)

    done = run("plain")
    refused(
        done,
        r"out of memory at 128 rows = 64 per rank x 2 ranks x 1 accumulation step; try --per_device_train_batch_size "
        r"32 --gradient_accumulation_steps 2 \(the same 128 per step\)",
    )
    run("packed").ok()


Broken = Callable[[str], Result]


@pytest.fixture
def broken(ranks: Ranks, tmp_path: Path) -> Broken:
    words = [str(word) for word in little_run("sft", tmp_path)]
    return lambda fault: ranks.run(cwd=tmp_path, function=f"tests.rank_faults:{fault}", words=words)


@pytest.mark.slow
def test_a_bug_shows_its_traceback(broken: Broken) -> None:
    done = broken("run_with_a_bug")
    assert done.codes == [1, 1] and "RuntimeError: nobody foresaw this" in done.text and "error: " not in done.text


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_at_once(broken: Broken) -> None:
    done = broken("run_where_rank_1_dies")
    assert done.codes == [1, -9], "rank 0 ends by itself"
    assert re.fullmatch(
        r"rank 0 stopped: another rank ended first \(.*Connection (closed|reset) by peer.*\)\n", done.text
    )


@pytest.mark.parametrize(
    ("error", "ranks", "kind"),
    [
        (RuntimeError("[pair.cc:1] Connection closed by peer [10.0.0.2]"), "2", "peer"),
        (RuntimeError("[pair.cc:1] Connection closed by peer [10.0.0.2]"), "1", "error"),
        (ConnectionResetError(104, "Connection reset by peer"), "2", "error"),  # of a hub or a store
    ],
)
def test_only_ranks_echo_each_other(error: Exception, ranks: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    found, line = failures._kind(error)
    assert found == kind and "by peer" in line, "what was said is kept"
