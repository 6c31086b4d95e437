"""The experiment: a start, a sweep of learning rates for each arm, several seeds at each arm's best, a report."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit import log, registry, run_folder
from align_kit.compare import arms, fair, judges, measures, page, reading, sweep, table
from align_kit.compare.arms import Arm
from align_kit.compare.options import Options, help_text, output_of, parse
from align_kit.compare.reading import Ran
from align_kit.compare.runs import Job, Launch, Runner, forget_weights, launch, resolve
from align_kit.compare.table import Results
from align_kit.errors import UserError
from align_kit.telemetry.clock import clock

if TYPE_CHECKING:
    from align_kit.compare.work import Task

SWEEP_SEED = 0  # the reported seeds follow it: no rate is judged by the run that it was chosen by
SPLIT_SEED = 0
# The embedded experiment, where nothing is named: short enough that all of it takes ten minutes on two cores.
SHORT = ("--max_steps", "96", "--logging_steps", "8", "--save_strategy", "steps", "--save_steps", "96")
SHORT_START = {"pretrain": ("--max_steps", "160")}
# Dropout would draw each copy of a shared prompt anew: one arm would compute what the other computes once.
SHORT_ADAPTER = ("--lora_dropout", "0")


def compare(argv: Sequence[str]) -> int:
    """Run the experiment that the words of a command line describe, print its report, and return the exit code."""
    words = list(argv)
    if any(word in ("-h", "--help") for word in words):
        print(help_text())
        return 0
    log.quiet()
    options = parse(words)
    with _asked_to_stop():
        return Experiment(options, arms.arms_of(options)).run()


@contextmanager
def _asked_to_stop() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the run at hand in its own way, and say how the experiment goes on."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        log.say("\nstopped; what is finished stays, and the same command goes on")
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, before)


class Experiment:
    """What is compared, in which folder, and what came of it."""

    def __init__(self, options: Options, compared: Sequence[Arm], launch: Launch = launch) -> None:
        self.options, self.arms = options, compared
        self.row = registry.get(options.recipe)
        self.configs = {arm.name: resolve(options.recipe, self._words(arm)) for arm in compared}
        self.varied = options.vary.partition("=")[0].strip().replace("-", "_")
        settings = {name: config.as_dict() for name, config in self.configs.items()}
        self.factor = arms.factor(settings, self.varied)
        for arm in compared:
            judges.check(options, self.configs[arm.name])
            judged = judges.evaluation(self.configs[arm.name], test=True, datasets=options.test_datasets)
            resolve(options.recipe, [*self._words(arm), *judged])  # what cannot be read is refused before any run
        self.home = output_of(options, tuple(arm.name for arm in compared))
        run_folder.make_private(self.home)
        self.runner = Runner(self.home, options.ranks, overwrite=options.overwrite, launch=launch)
        self.swept = self._is_swept()
        self.start: tuple[str, ...] = ()  # words that name the start
        self.seen: list[Ran] = []

    def _words(self, arm: Arm) -> list[str]:
        """Return what every run of an arm is given."""
        files = self.options.configs or (f"recipes/{self.options.recipe}.yaml",)
        short: tuple[str, ...] = SHORT if self.options.default else ()
        if self.options.default and not self.options.arms:
            short += SHORT_ADAPTER
        return ["--config", *arm.below, *files, *arm.above, *short, *self.options.words, *arm.words]

    def _is_swept(self) -> bool:
        """Tell whether learning rates are looked for: where none is given for all arms, and it is not what varies."""
        given = any(config.origin.get("learning_rate") == "command line" for config in self.configs.values())
        return not given and self.varied != "learning_rate"

    # --- the runs ---

    def run(self) -> int:
        """Do what is not done yet, write the report, and return the exit code."""
        self._say_plan()
        self._count(len(self.arms) * (self.options.seeds + self._fewest_rates()))
        self._make_start()
        found = {arm.name: self._sweep(arm) for arm in self.arms} if self.swept else {}
        rates = {arm.name: found[arm.name].rate if found else self._own_rate(arm) for arm in self.arms}
        self._report(self._final_runs(rates), found)
        return 0

    def _say_plan(self) -> None:
        names = " against ".join(arm.name for arm in self.arms)
        rates = "learning rates swept on one seed, " if self.swept else ""
        log.say(f"align_kit compare {self.options.recipe}: {names}; {rates}{self.options.seeds} seeds each")
        log.say(f"  factor     {', '.join(self.factor)}")
        log.say(f"  output     {self.home}")

    def _fewest_rates(self) -> int:
        return (len(self.options.rates) or 3) if self.swept else 0

    def _count(self, more: int) -> None:
        self.runner.expected += more

    def _own_rate(self, arm: Arm) -> float:
        return float(self.configs[arm.name].value("learning_rate"))

    def _job(self, arm: Arm, rate: float, seed: int, *, test: bool) -> Job:
        judged = judges.evaluation(self.configs[arm.name], test=test, datasets=self.options.test_datasets)
        # Rows are held out by the experiment, not by a seed: intervals over seeds are of the same rows.
        held = () if self.configs[arm.name].given("test_split_seed") else ("--test_split_seed", str(SPLIT_SEED))
        quiet = () if self.configs[arm.name].given("sample_prompts") else ("--sample_prompts", "0")
        words = [*self._words(arm), *self.start, *judged, *held, *quiet, "--seed", str(seed)]
        words += ["--learning_rate", f"{rate:.6g}"]
        return Job(
            self.options.recipe,
            tuple(words),
            self.home / arm.name / f"lr{rate:g}-seed{seed}",
            f"{arm.name}, learning rate {rate:.2g}, seed {seed}",
            may_diverge=not test,
        )

    def _sweep(self, arm: Arm) -> sweep.Found:
        """Return what the arm's learning rates gave on held-out rows, one seed each."""
        losses: dict[float, float] = {}
        quantity = sweep.LOSS
        for rate in self._rates_to_try(arm, losses):
            ran = self._ran(arm, rate, SWEEP_SEED, test=False)
            losses[rate] = _judged(ran)
            if ran is not None:
                quantity = ran.quantity
                forget_weights(ran.home)  # of a model that nothing more is asked of
        if min(losses.values()) == float("inf"):
            tried = ", ".join(f"{rate:.2g}" for rate in losses)
            raise UserError(f"{arm.name} diverged at every learning rate ({tried}); give lower --learning_rates")
        found = sweep.found(losses, quantity)
        best = f"{quantity} {found.values[found.rate]:.4f} at a learning rate of {found.rate:.2g}"
        log.say(f"         {arm.name}: {best}")
        return found

    def _rates_to_try(self, arm: Arm, losses: dict[float, float]) -> Iterator[float]:
        """Yield the rates named, or one after the other those that the losses so far lead to."""
        if self.options.rates:
            yield from self.options.rates
            return
        start = self._own_rate(arm)
        while (rate := sweep.following(losses, start)) is not None:
            self._count(len(losses) >= self._fewest_rates())
            yield rate

    def _final_runs(self, rates: dict[str, float]) -> dict[str, list[Ran]]:
        """Return the runs that are reported: every arm at its rate, seed by seed, so that arms meet like conditions."""
        runs: dict[str, list[Ran]] = {arm.name: [] for arm in self.arms}
        for seed in range(SWEEP_SEED + 1, SWEEP_SEED + 1 + self.options.seeds):
            for arm in self.arms:
                ran = self._ran(arm, rates[arm.name], seed, test=True)
                assert ran is not None  # only a run of a sweep may diverge
                runs[arm.name].append(ran)
        return runs

    def _ran(self, arm: Arm, rate: float, seed: int, *, test: bool) -> Ran | None:
        """Return one run, done now or before, held against those of the same seed; `None` where it diverged."""
        job = self._job(arm, rate, seed, test=test)
        manifest = self.runner.manifest(job)
        if manifest is None:
            return None
        self.seen.append(reading.read(arm.name, rate, seed, job.home, manifest))
        fair.check(self.seen, self.factor)
        return self.seen[-1]

    # --- the start ---

    def _make_start(self) -> None:
        """Find what all runs start from, as the recipe would; make it where there is nothing to start from."""
        named = ("model_name_or_path", "starts_from", "config_name")
        if any(config.given(name) for config in self.configs.values() for name in named):
            return
        beside = Path(self.configs[self.arms[0].name].value("output_dir"))
        before = run_folder.predecessor(beside, self.row.starts_from)
        folder = before[0] if before else self._made_start()
        self.start = ("--model_name_or_path", str(folder))

    def _made_start(self) -> Path:
        chain = [self.row.starts_from[0]]
        while chain[0] not in registry.get(chain[0]).starts_from:
            chain.insert(0, registry.get(chain[0]).starts_from[0])
        self._count(len(chain))
        for phase in chain:
            short = SHORT_START.get(phase, ()) if self.options.default else ()
            words = ("--seed", str(SWEEP_SEED), "--sample_prompts", "0", *short)
            self.runner.manifest(Job(phase, words, self.home / phase, f"{phase}, to start from"))
        return self.home / chain[-1]

    # --- what came of it ---

    def _report(self, runs: dict[str, list[Ran]], found: dict[str, sweep.Found]) -> None:
        every = [ran for some in runs.values() for ran in some]
        measured, asked, texts = self._measure(every)
        runs = {arm: [reading.with_found(ran, measured[_name(ran)]) for ran in some] for arm, some in runs.items()}
        every = [ran for some in runs.values() for ran in some]
        quality = measures.reachable(every) if self.options.quality is None else self.options.quality
        quality = quality if measures.one_loss(self.factor, every) else None
        rows = measures.measures(every, texts, quality)
        wanted = ["answers"] * bool(asked) + ["text"] * (self.options.forgetting is None)
        results = Results(
            recipe=self.options.recipe,
            factor=self.factor,
            runs=runs,
            sweeps=found,
            rows=rows,
            start=every[0].manifest["policy"]["name"],
            before=measured.get("start", {}),
            problems=asked,
            notes=[*self._notes(runs), *measures.unmeasured(rows, every, texts, wanted)],
            same_rows=self._same_rows(every),
        )
        self._write(results)

    def _notes(self, runs: dict[str, list[Ran]]) -> list[str]:
        """Return what a reader must know of how the arms were run and judged."""
        modes = {arm: some[0].manifest["forward"]["mode"] for arm, some in runs.items()}
        told = ", ".join(f"{arm} {mode}" for arm, mode in modes.items())
        differ = [f"Batches were computed in different ways, which shows in speed and memory: {told}."]
        differ = differ if len(set(modes.values())) > 1 else []
        return [*differ, *self._other_losses(runs), *_placed(runs), *self._bits()]

    def _other_losses(self, runs: dict[str, list[Ran]]) -> list[str]:
        """Return a sentence where the arms' held-out losses are not the same quantity."""
        if measures.one_loss(self.factor, [ran for some in runs.values() for ran in some]):
            return []
        keys = ", ".join(self.factor)
        return [f"What the held-out loss is depends on {keys}: the arms' losses cannot be held against each other."]

    def _bits(self) -> list[str]:
        """Return a sentence where a base is in 4 bits in training, and not in what is measured afterwards."""
        names = [arm.name for arm in self.arms if self.configs[arm.name].value("load_in_4bit")]
        if not names:
            return []
        return [
            f"The base of {', '.join(names)} is in 4 bits in training and in its evaluations, so that its held-out "
            "loss need not begin where that of a whole base does. Answers, loss on text and update are of its adapter "
            "merged into the base in full precision, and the gap of logits is between the two: mostly what 4 bits "
            "round off."
        ]

    def _same_rows(self, reported: Sequence[Ran]) -> bool:
        """Tell whether the runs are judged by rows that the rates were chosen by, as their manifests account for."""
        return fair.same_held_out([ran for ran in self.seen if ran.seed == SWEEP_SEED], reported)

    def _write(self, results: Results) -> None:
        text = table.markdown(results)
        (self.home / "report.md").write_text(text + "\n")
        (self.home / "compare.json").write_text(json.dumps(table.plain(results), indent=2) + "\n")
        place = page.write(results, self.home / "report.html")
        beside = f"{self.home / 'report.md'}, {self.home / 'compare.json'}"
        log.say(f"\n{text}\n\n{clock(self.runner.elapsed)} in all; report: {place}, {beside}")

    def _measure(self, runs: Sequence[Ran]) -> tuple[dict[str, dict[str, Any]], str, list[str]]:
        """Return what was measured on every final model and the start, the card of problems, the names of the texts."""
        from align_kit.compare.measuring import measure

        tasks, asked, texts = self._tasks(runs)
        log.say(f"  measuring {len(tasks)} models")
        return measure(tasks, self.home / "measures", self.options.ranks), asked, texts

    def _tasks(self, runs: Sequence[Ran]) -> tuple[dict[str, Task], str, list[str]]:
        from align_kit.compare.work import Task
        from align_kit.models import load, source

        start = source.resolve(runs[0].manifest["policy"]["name"], random=True)
        words = load.load_tokenizer(start)
        texts = tuple(judges.texts(self.options, start.folder, words, run_folder.cache_folder(os.environ)))
        asked = judges.problems(self.options, self.configs[self.arms[0].name])
        tasks = {}
        for ran in runs:
            policy = ran.manifest["policy"]
            began = None if policy["random"] else source.resolve(policy["name"]).folder
            tasks[_name(ran)] = Task(ran.home, began, asked, texts, 1)
        if not runs[0].manifest["policy"]["random"]:
            tasks["start"] = Task(start.folder, None, asked, texts, 1)
        return tasks, asked.card if asked else "", [text.name for text in texts]


def _placed(runs: dict[str, list[Ran]]) -> list[str]:
    """Return a sentence for each frozen model that does not stand in the same place in all arms."""
    first = {arm: some[0].manifest["frozen"] for arm, some in runs.items()}
    said = []
    for role in sorted({role for frozen in first.values() for role in frozen}):
        places = {arm: frozen.get(role, {}).get("placement", "none") for arm, frozen in first.items()}
        if len(set(places.values())) > 1:
            told = ", ".join(f"{arm} {place}" for arm, place in places.items())
            said.append(f"The {role} stands in different places, which shows in memory, traffic and speed: {told}.")
    return said


def _name(ran: Ran) -> str:
    return f"{ran.arm}-seed{ran.seed}"


def _judged(ran: Ran | None) -> float:
    """Return what a rate is chosen by, less being better: the last held-out loss, or the reward turned round."""
    if ran is None:
        return float("inf")
    line = ran.evaluated
    if not line:
        raise UserError(f"{ran.home} was never evaluated: no rate can be chosen; evaluate at least once, at its end")
    return -float(line["eval_reward"]) if ran.quantity == sweep.REWARD else float(line["eval_loss"])
