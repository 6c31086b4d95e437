"""A process that has imported the whole stack and forks ranks from it.

An import costs seconds of CPU in each process; a fork of one that has it costs milliseconds. Requests come as JSON
lines on standard input, answers leave on standard output. Each rank is a fork with its own environment, working
folder and output files; it runs either the command line of align_kit or a function by dotted path.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any


def warm() -> None:
    """Do once what every run would: nothing may start a thread or touch the thread pools of torch before the fork."""
    from align_kit import imports, log

    log.quiet()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with imports.uncollected():  # what is here stays: a fork's collections need not walk it
        import_all()
        look_up()


def import_all() -> None:
    """Import what any run imports."""
    for name in (
        "align_kit.cli",
        "align_kit.run",
        "align_kit.stages",
        "align_kit.narrate",
        "align_kit.trainers.language",
        "align_kit.trainers.other_world",
        "align_kit.trainers.ppo",
        "align_kit.trainers.preference",
        "align_kit.trainers.probe",
        "align_kit.trainers.reward",
        "align_kit.trainers.save",
        "align_kit.trainers.unpaired",
        "align_kit.trainers.arguments",
        "align_kit.report.run_page",
        "align_kit.data.embedded",
        "align_kit.telemetry.progress",
        "align_kit.telemetry.trackers",
        "deepspeed.runtime.zero.stage3",
        "transformers.models.llama.modeling_llama",
        "trl.trainer.sft_config",
        "trl.trainer.dpo_config",
        "peft.tuners.lora",
        "accelerate.utils.deepspeed",
        "deepspeed.comm.mori",
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.runtime.superoffload.superoffload_stage3",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # the engine's optimizer check imports it, 2 s each time
        "tests.rank_work",
        "numpy.ctypeslib",
        "torch._subclasses.schema_check_mode",
        "torch.profiler._cupti_monitor",
        "trl.trainer.kto_config",
        "trl.trainer.reward_config",
    ):
        importlib.import_module(name)


def look_up() -> None:
    """Fill the caches that a run fills: names of stored weights, this machine's rates, operators, fonts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from align_kit.models.hollow import hollow
    from align_kit.plan import hardware
    from align_kit.plan.shape import shape_of
    from align_kit.report import plots

    plots.svg(plots.lines({"a": [(0, 0), (1, 1)]}, x="step", y="loss"), "a")
    get_checkpoint_conversion_mapping("llama")
    if not os.path.exists("/dev/nvidia0"):  # to look at a GPU before the fork would take it from the ranks
        machine = hardware.here()
        assert machine.bandwidth and machine.flops["fp32"]
    with hollow(torch.float32):
        sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        small = LlamaConfig(num_hidden_layers=2, **sizes)
        shape_of(LlamaForCausalLM(small), "small", "fp32")


def become_rank(request: dict[str, Any], rank: int) -> int:
    """Run the request in this forked process and return the exit code."""
    os.setsid()
    out = os.open(f"{request['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    if request["world_size"] > 1 or request["ranked"]:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(request["world_size"]),
            LOCAL_WORLD_SIZE=str(request["world_size"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(request["port"]),
        )
    sys.argv = ["align-kit", *request["argv"]]
    try:
        if request["function"]:
            module, _, name = request["function"].partition(":")
            code = getattr(importlib.import_module(module), name)(**request["kwargs"])
        else:
            from align_kit.cli import main

            code = main(request["argv"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


def serve_one(request: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks of a request and wait for them; when one fails, or time runs out, end the others."""
    began = time.monotonic()
    children: dict[int, int] = {}
    for rank in range(request["world_size"]):
        child = os.fork()
        if child == 0:
            os._exit(become_rank(request, rank))
        children[child] = rank
    codes: list[int | None] = [None] * request["world_size"]
    deadline, failed_at = began + request["timeout"], None
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
            if status and failed_at is None:
                failed_at = time.monotonic()
            continue
        if time.monotonic() > deadline or (failed_at and time.monotonic() > failed_at + request["grace"]):
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return {"codes": codes, "seconds": time.monotonic() - began}


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve_one(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
