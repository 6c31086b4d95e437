"""What comes from others is data: pickles, code beside models, chat templates; secrets and folders stay private."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import shutil
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align_kit.checkpoint import trusted
from align_kit.data.render import Renderer
from align_kit.errors import UserError
from align_kit.models import load, source
from align_kit.run_folder import RunFolder, make_private, open_folder
from align_kit.scrub import HIDDEN, scrubbed
from tests.data_rows import assistant, chat_tokenizer, trl_template, user
from tests.harmful import FORMATS, Opens, Runs, with_code
from tests.small import write_model

FP32 = {"dtype": torch.float32, "seed": 0}


# --- pickles ----------------------------------------------------------------------------------------------


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The file that harm would create; it is not there at the end."""
    yield tmp_path / "harmed"
    assert not (tmp_path / "harmed").exists(), "code was run"


@pytest.mark.parametrize("harm", [Runs, Opens])
@pytest.mark.parametrize("form", FORMATS)
def test_a_pickle_that_runs_code_is_refused_unrun(form: str, harm: type[Runs], tmp_path: Path, mark: Path) -> None:
    place = tmp_path / "checkpoint-3" / "global_step3" / "shard.pt"
    place.parent.mkdir(parents=True)
    FORMATS[form]({"weights": torch.ones(3), "harm": harm(mark)}, place)
    for call in (lambda: trusted.load(place), lambda: trusted.vet(tmp_path / "checkpoint-3")):
        with pytest.raises(UserError, match="could run code; go on from another .* --trust_checkpoint") as raised:
            call()
        assert str(raised.value).startswith(str(place))
        if form in ("zip", "legacy"):
            assert {Runs: "asks for posix.system", Opens: "asks for io.open"}[harm] in str(raised.value)


@pytest.mark.parametrize("form", ["zip", "legacy", "newer"])
def test_the_harm_is_real(form: str, tmp_path: Path) -> None:
    """Trusted, the same files run: what the tests above refuse would have happened."""
    FORMATS[form]({"harm": Opens(tmp_path / "harmed")}, tmp_path / "shard.pt")
    trusted.vet(tmp_path, trust=True)
    assert not (tmp_path / "harmed").exists()
    trusted.load(tmp_path / "shard.pt", trust=True)["harm"].close()
    assert (tmp_path / "harmed").exists()


@pytest.mark.parametrize("name", ["model.bin", "rng_state_0.pth", "states.pt", "a.pkl", "b.ckpt", "c.pickle"])
def test_vetting_finds_every_kind_of_file(name: str, tmp_path: Path, mark: Path) -> None:
    FORMATS["bare"](Runs(mark), tmp_path / name)
    with pytest.raises(UserError, match=name):
        trusted.vet(tmp_path)


def test_a_class_that_is_changed_is_refused(tmp_path: Path) -> None:
    """Every name in this pickle is allowed; what it does, setting an attribute of a class, is not."""
    code = b"\x80\x02ctorch.storage\nUntypedStorage\nN}X\x04\x00\x00\x00pwndK\x01s\x86b."
    for form, name in (("zip", "data.pkl"), ("bare", "")):
        place = tmp_path / f"{form}.pt"
        place.write_bytes(code)
        if name:
            _as_zip({"zip/data.pkl": code, "zip/version": b"3\n"}, place)
        with pytest.raises(UserError, match="could run code"):
            trusted.load(place)
    changed: Any = torch.storage.UntypedStorage
    assert not hasattr(changed, "pwnd")
    pickle.loads(code)
    assert changed.pwnd == 1
    del changed.pwnd


def _as_zip(entries: dict[str, bytes], place: Path) -> None:
    writer = torch._C.PyTorchFileWriter(str(place))
    for name, data in entries.items():
        writer.write_record(name.partition("/")[2], data, len(data))
    writer.write_end_of_file()


def test_programs_and_archives_are_refused(tmp_path: Path) -> None:
    program = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    torch.jit.save(program, tmp_path / "program.pt")
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    for name in ("program.pt", "old.pt"):
        with pytest.raises(UserError, match=name):
            trusted.load(tmp_path / name)


NONE = {"empty": b"", "half a zip": b"PK\x03\x04 and no more", "noise": os.urandom(64), "half a pickle": b"\x80\x02}"}


@pytest.mark.parametrize("data", NONE.values(), ids=NONE)
def test_a_file_that_is_none_ends_in_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "shard.pt").write_bytes(data)
    with pytest.raises(UserError, match="shard.pt") as raised:
        trusted.load(tmp_path / "shard.pt")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_what_checkpoints_are_made_of_is_loaded(tmp_path: Path) -> None:
    """DeepSpeed's own classes, of fp16 and of ZeRO-2 too, and numpy's state of the generators."""
    import numpy as np
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    fp16 = DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2, False, True)
    state = {
        "stage": ZeroStageEnum.gradients,
        "loss_scaler": LossScaler(scale=1.0),
        "fp16": fp16,
        "mapping": fragment_address(numel=3, start=0),
        "numpy": np.random.RandomState(3).get_state(),  # noqa: NPY002
        "tensor": torch.arange(3),
    }
    torch.save(state, tmp_path / "state.pt")
    trusted.vet(tmp_path)
    found = trusted.load(tmp_path / "state.pt", map_location="cpu")
    assert found["stage"] is ZeroStageEnum.gradients and found["mapping"].numel == 3
    assert vars(found["fp16"]) == vars(fp16) and found["tensor"].tolist() == [0, 1, 2]


def test_other_objects_are_loaded_where_the_file_is_trusted(tmp_path: Path) -> None:
    torch.save({"options": argparse.Namespace(depth=3)}, tmp_path / "state.pt")
    with pytest.raises(UserError, match="state.pt asks for argparse.Namespace"):
        trusted.load(tmp_path / "state.pt")
    assert trusted.load(tmp_path / "state.pt", trust=True)["options"].depth == 3


def test_a_missing_file_is_the_disks_word(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trusted.load(tmp_path / "none.pt")


# --- models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("stored") / "model")


@pytest.fixture
def model(stored: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stored, tmp_path / "model")


def test_pickled_weights_beside_safetensors_are_not_opened(model: Path, mark: Path) -> None:
    before = load.load_policy(source.resolve(str(model)), **FP32).state_dict()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        FORMATS["zip"](Runs(mark), model / name)
    after = load.load_policy(source.resolve(str(model)), **FP32).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pickled_weights_alone_are_refused(model: Path, mark: Path) -> None:
    (model / "model.safetensors").unlink()
    FORMATS["zip"](Runs(mark), model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds \*.bin \(pickled\) weights only; convert them to safetensors"):
        source.resolve(str(model))


def test_an_index_that_names_a_pickle_is_refused(model: Path, mark: Path) -> None:
    FORMATS["zip"](Runs(mark), model / "pytorch_model.bin")
    index = '{"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}'
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="names pytorch_model.bin among its weights; only .*safetensors are read"):
        load.load_policy(source.resolve(str(model)), **FP32)


def test_a_pickled_adapter_is_refused(model: Path, tmp_path: Path, mark: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{model}", "peft_type": "LORA"}}')
    FORMATS["zip"](Runs(mark), adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter' is an adapter without adapter_model.safetensors; convert it"):
        source.resolve(str(adapter))


def test_code_beside_a_known_model_is_not_run(model: Path, mark: Path) -> None:
    """The class that transformers has is taken, and the tokenizer's that it knows."""
    where = source.resolve(str(with_code(model, mark)))
    assert type(load.load_policy(where, **FP32)).__module__.startswith("transformers.")
    assert type(load.load_config(where, None)).__module__.startswith("transformers.")
    with pytest.raises(UserError, match="it comes with code of its own; read that, then give --trust_remote_code true"):
        load.load_tokenizer(where)


def test_code_of_an_unknown_model_is_not_run(model: Path, mark: Path) -> None:
    where = source.resolve(str(with_code(model, mark, kind="my_llama")))
    for call in (lambda: load.load_policy(where, **FP32), lambda: load.load_config(where, None)):
        with pytest.raises(UserError, match="code of its own; read that, then give --trust_remote_code true"):
            call()


def test_code_that_is_trusted_is_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the two tests above refuse would have run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    where = source.resolve(str(with_code(model, tmp_path / "harmed", kind="my_llama")))
    config = load.load_config(where, None, trust_remote_code=True)
    assert type(config).__name__ == "Config" and (tmp_path / "harmed").exists()


# --- chat templates ---------------------------------------------------------------------------------------

ESCAPES = {
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a function's globals": "{{ raise_exception.__globals__['os'].system('touch harmed') }}",
    "a format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a change of the data": "{{ messages.append(messages[0]) }}",
    "no end": "{% for a in range(999999999) %}{% endfor %}",
    "a division": "{{ 1 / 0 }}",
    "itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "a mistake": "{% for %}",
}


@pytest.mark.parametrize("kind", ESCAPES)
def test_a_template_stays_in_its_sandbox(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"messages": [user("a"), assistant("b")]}
    marked = ESCAPES[kind] + "{% generation %}b{% endgeneration %}"
    for template, call in ((ESCAPES[kind], "conversations"), (marked, "assistant_masks")):
        words = chat_tokenizer(trl_template("llama3"))
        for renderer in (Renderer(chat_tokenizer(template)), Renderer(words, template)):
            with pytest.raises(UserError, match="the chat template refuses a conversation with the roles user, assist"):
                getattr(renderer, call)([row])
    assert list(tmp_path.iterdir()) == []


# --- secrets ----------------------------------------------------------------------------------------------

HF = "hf_" + "aB3" * 11
HIDE = [
    ({"env": {"HF_TOKEN": "t", "my_password": "p", "NCCL_DEBUG": "INFO"}},
     {"env": {"HF_TOKEN": HIDDEN, "my_password": HIDDEN, "NCCL_DEBUG": "INFO"}}),
    ({"comet": {"api_key": "k", "project": "p"}, "hub_token": "x"},
     {"comet": {"api_key": HIDDEN, "project": "p"}, "hub_token": HIDDEN}),
    ("https://me:p@ss@host/x?a=1", f"https://{HIDDEN}@host/x?a=1"),
    ("s3://b/k?X-Amz-Signature=ab%2f&X-Amz-Credential=q&x=1",
     f"s3://b/k?X-Amz-Signature={HIDDEN}&X-Amz-Credential={HIDDEN}&x=1"),
    (["try " + HF, ("ghp_" + "a1" * 15,)], [f"try {HIDDEN}", (HIDDEN,)]),
    ("cannot load https://u:t@h/d: 401", f"cannot load https://{HIDDEN}@h/d: 401"),
    ("my run with 0123456789abcdef0123", f"my run with {HIDDEN}"),
    ({"env": {"AZURE_STORAGE_CONNECTION_STRING": "Protocol=https;AccountKey=a1+/b==;Suffix=x", "DB_DSN": "d"}},
     {"env": {"AZURE_STORAGE_CONNECTION_STRING": HIDDEN, "DB_DSN": HIDDEN}}),
    ({"env": {"GH_PAT": "p", "OPENAI_AUTH": "a", "db_pass": "w"}},
     {"env": {"GH_PAT": HIDDEN, "OPENAI_AUTH": HIDDEN, "db_pass": HIDDEN}}),
    ({"account_key": "k", "x-api-key": "k", "accountKey": "k", "Authorization": "Bearer k", "MY_KEY": "k"},
     dict.fromkeys(("account_key", "x-api-key", "accountKey", "Authorization", "MY_KEY"), HIDDEN)),
    ({"openai_api_keys": ["k", "l"], "credentials": {"user": "u", "port": 1}},
     {"openai_api_keys": [HIDDEN, HIDDEN], "credentials": {"user": HIDDEN, "port": 1}}),
    (["run", "--api_key", "k", "--steps", "3"], ["run", "--api_key", HIDDEN, "--steps", "3"]),
    (("--x-api-key", "k k"), ("--x-api-key", HIDDEN)),
    ("AWS_SECRET_ACCESS_KEY=a/b+c run", f"AWS_SECRET_ACCESS_KEY={HIDDEN} run"),
    ("run --password hunter22 --steps 3", f"run --password {HIDDEN} --steps 3"),
    ("run --api-key=k 'password = a' token='b c'", f"run --api-key={HIDDEN} 'password = {HIDDEN}' token='{HIDDEN}'"),
    ("AccountName=n;AccountKey=a1+/b==;Suffix=x", f"AccountName=n;AccountKey={HIDDEN};Suffix=x"),
    ('refused: {"api_key": "k", "n": 1}', f'refused: {{"api_key": "{HIDDEN}", "n": 1}}'),
    ("-H 'Authorization: Bearer a.b' -H 'x-api-key: k'", f"-H 'Authorization: {HIDDEN}' -H 'x-api-key: {HIDDEN}'"),
    ("sent Bearer abc1234567.x", f"sent Bearer {HIDDEN}"),
    ("https://user:pa/ss@host/x, me", f"https://{HIDDEN}@host/x, me"),
    ("with /no/such/base64 in it", f"with {HIDDEN} in it"),
    ("with 482913, not 14829130", f"with {HIDDEN}, not 14829130"),
]  # fmt: skip
KEEP: list[Any] = [
    {"eos_token": "<|im_end|>", "pad_token": "<pad>", "tokenizer_name": "gpt2-large", "max_length": 7, "tokens": "7"},
    "me@example.org", "/home/a/b@c", "s3://bucket/a@b", "a" * 40, "hf_short", None, 3.5, True, "/run/secrets/key",
    "it ends in <|im_end|> here", {"image_token": "<image>"}, {"stop_tokens": ["a"], "image_token": {"content": "<i>"}},
    {"env": {"EOS_TOKEN": "end", "SSH_AUTH_SOCK": "/run/agent", "TOKENIZERS_PARALLELISM": "false"}},
    "https://host:8080/a@b", "unknown token: foo", "eos_token='end' hub_token=None", "--control_tokens tokens",
    f"read from {__file__}", ["--eos_token", "end", "--hub_token", "--x"],
]  # fmt: skip


@pytest.mark.parametrize("given, shown", HIDE)
def test_secrets_are_hidden(given: Any, shown: Any) -> None:
    environ = {"WANDB_API_KEY": "0123456789abcdef0123", "S3_SECRET": "/no/such/base64", "DB_PASSWORD": "482913"}
    assert scrubbed(given, environ) == shown
    assert scrubbed(shown, environ) == shown, "a second time"


@pytest.mark.parametrize("value", KEEP)
def test_what_is_no_secret_stays(value: Any) -> None:
    environ = {"TOKENIZER_NAME": "gpt2-large", "KEY_FILE": "/run/secrets/key", "A_KEY": "short", "A_TOKEN": "12345678",
               "EOS_TOKEN": "<|im_end|>", "SIGNING_KEY": __file__}  # fmt: skip
    assert scrubbed(value, environ) == value


def test_a_runs_manifest_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in what it was told, and not in the error it failed with."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    home = RunFolder(tmp_path / "out", {})
    home.write(config={"run_name": "0123456789abcdef0123"}, path=Path(f"/data/{HF}"))
    with pytest.raises(ValueError), home.telling_failure():
        raise ValueError("https://me:hidden-word@host said no")
    text = (tmp_path / "out" / "manifest.json").read_text()
    assert "said no" in text and not any(word in text for word in (HF, "0123456789abcdef0123", "hidden-word"))


# --- folders ----------------------------------------------------------------------------------------------


def permissions(place: Path) -> int:
    return stat.S_IMODE(place.stat().st_mode)


def test_new_folders_are_their_owners_alone(tmp_path: Path) -> None:
    open_folder(str(tmp_path / "runs" / "sft"), resume=None, overwrite=False)
    assert [permissions(tmp_path / place) for place in ("runs", "runs/sft")] == [0o700, 0o700]


def test_a_folder_that_exists_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "team").mkdir()
    (tmp_path / "team").chmod(0o775)
    make_private(tmp_path / "team")
    open_folder(str(tmp_path / "team"), resume=None, overwrite=False)
    make_private(tmp_path / "team" / "mine")
    assert [permissions(tmp_path / place) for place in ("team", "team/mine")] == [0o775, 0o700]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_users_own_permissions(umask: int, tmp_path: Path) -> None:
    """In a folder that the user has made for a team, the umask decides, as for any other program."""
    before = os.umask(umask)
    try:
        RunFolder(tmp_path, {}).write(phase="sft")
    finally:
        os.umask(before)
    assert permissions(tmp_path / "manifest.json") == 0o666 & ~umask


def test_a_file_in_the_way_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            make_private(place)
