"""Proximal policy optimisation from rewards: the policy writes, rewards judge, both policy and value function learn.

One iteration: write completions to prompts (rollout), judge them (score), turn scores into advantages, and take
`num_ppo_epochs` x `num_mini_batches` optimizer steps on them (update). Where a detail is a choice, it follows Huang
2024 ("The N+ Implementation Details of RLHF with PPO", arXiv 2403.17031) unless it says otherwise:

- the score stands on the last token of a completion, the KL penalty on each token;
- a completion that does not end may be charged `missing_eos_penalty`;
- advantages are whitened over the tokens of all ranks, and so are rewards where that is asked for;
- dropout is off, so that the probability ratio is 1 before the first update of an iteration;
- losses are means over tokens of the whole mini-batch, whatever the number of ranks and micro-batches;
- the value function starts from the policy's own start, with a head at zero.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from align_kit.data.collate import LanguageCollator
from align_kit.data.origins import COLUMN as SOURCE_PARTS
from align_kit.errors import UserError
from align_kit.forward.logprobs import token_logps, tokens_and_values, value_states
from align_kit.losses import AdaptiveKL, FixedKL, RunningMoments, policy_loss, value_loss
from align_kit.models.quantiles import ends_of
from align_kit.telemetry import spent
from align_kit.telemetry.replayed import put_aside
from align_kit.trainers import experience
from align_kit.trainers.assess import Assessor
from align_kit.trainers.base import BatchLoss, Known, PhaseTrainer, Tallies
from align_kit.trainers.experience import Columns, Shaping
from align_kit.trainers.iteration import Endless, IterationEnd
from align_kit.trainers.reference import largest_gap
from align_kit.trainers.rewards import check_named, reward_source, rewards_of
from align_kit.trainers.rollout import GATHERED, LocalWriter, Sampling, Writer, copy_bytes, draws_for

SAMPLES = "samples.jsonl"
EVALUATION = 1 << 30  # stands for the iteration in the draws of an evaluation, which are the same every time


class PPO(PhaseTrainer):
    """PPO on a `PolicyAndValue` (Schulman 2017), under plain `transformers.Trainer` and one ZeRO-3 engine.

    `train_dataset` holds prompts ("prompt_ids", and "prompt", "answer" for reward functions). The batch of an
    optimizer step counts completions.
    """

    headline = ("reward", "kl", "value/explained_variance", "eval_reward")

    # --- set-up ---

    @classmethod
    def derive(cls, args: Any, known: Known) -> dict[str, tuple[Any, str]]:
        return {**reward_source(args, known), **_rollout_placement(args, known)}

    @property
    def stored_model(self) -> Any:
        return self.model.policy

    @staticmethod
    def collator(tokenizer: Any, args: Any) -> Callable[[Any], dict[str, Tensor]]:
        language = LanguageCollator(tokenizer.pad_token_id)
        return lambda rows: language(
            [{"input_ids": row["prompt_ids"], "loss_mask": [1] * len(row["prompt_ids"])} for row in rows]
        )

    @classmethod
    def check(cls, args: Any) -> None:
        completions, each = _completions(args), args.num_generations
        if completions % each:
            raise UserError(
                f"an iteration writes {completions} completions (num_mini_batches x the global batch), which is no "
                f"multiple of num_generations {each}; change one of them"
            )
        check_named(args.reward_funcs or [])

    def prepare(self) -> None:
        args = self.args
        args.ignore_data_skip = True  # a resumed run goes on with the next iteration; no prompt is drawn to be skipped
        if args.max_steps <= 0:
            args.max_steps = self._steps_of_epochs()
        tokenizer: Any = self.processing_class
        self.writer: Writer = LocalWriter(
            self.model.policy,
            Sampling(
                args.response_length, args.temperature, ends_of(self.model.policy, tokenizer), tokenizer.pad_token_id,
                args.rollout_batch_size,
            ),
            args.rollout_placement,
        )  # fmt: skip
        self.shaping = Shaping(args.gamma, args.lam, args.kl_estimator, args.whiten_rewards, args.whiten_advantages)
        fixed, target = FixedKL(args.kl_coef), args.kl_target
        self.kl_coef = fixed if target is None else AdaptiveKL(target, args.kl_horizon, args.kl_coef)
        self.moments = RunningMoments()
        self.assess = Assessor(
            tokenizer, self.frozen["reference"], rewards_of(self.frozen, args, tokenizer), args.temperature,
            args.score_batch_size or args.per_device_train_batch_size, args.device,
        )  # fmt: skip
        self.iteration = 0  # iterations written so far
        self.written = 0  # iterations written by this process, which took these seconds
        self.seconds = {"rollout": 0.0, "score": 0.0, "update": 0.0}
        self._mid_iteration = False
        self._update_began, self._approximate_kl = 0.0, [0.0, 0.0]
        self.add_callback(IterationEnd(self))

    @property
    def completions_per_iteration(self) -> int:
        """Completions written in an iteration, over all ranks."""
        return _completions(self.args)

    def _steps_of_epochs(self) -> int:
        """Return the optimizer steps that write to every prompt `num_train_epochs` times."""
        args = self.args
        iterations = args.num_train_epochs * len(self.train_dataset) * args.num_generations
        steps = iterations / self.completions_per_iteration * args.num_ppo_epochs * args.num_mini_batches
        return max(1, round(steps))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Give the value function its own learning rate where one is set."""
        made = super().create_optimizer(model)
        rate = self.args.value_learning_rate
        if rate is not None:
            if "optimizer" in self.args.hf_deepspeed_config.config:
                raise UserError(
                    "value_learning_rate needs the Trainer's optimizer and the DeepSpeed configuration brings its own; "
                    "drop one of them"
                )
            theirs = {id(parameter) for parameter in self.model.value_parameters()}
            for group in list(made.param_groups):
                values = [p for p in group["params"] if id(p) in theirs]
                group["params"] = [p for p in group["params"] if id(p) not in theirs]
                made.add_param_group({**group, "params": values, "lr": rate})
            made.param_groups = [group for group in made.param_groups if group["params"]]
        return made

    # --- rollout and score ---

    def get_train_dataloader(self) -> Any:
        """Return what yields micro-batches for ever: an iteration's own, then the next one's."""
        return Endless(self._micro_batches)

    def _micro_batches(self) -> Iterator[dict[str, Any]]:
        args = self.args
        while True:
            rows = self._collect()
            updates = [(e, m) for e in range(args.num_ppo_epochs) for m in range(args.num_mini_batches)]
            size = self.completions_per_iteration // args.num_mini_batches
            for number, (epoch, part) in enumerate(updates):
                order = experience.order(len(rows["scores"]), seed=args.seed, iteration=self.iteration, epoch=epoch)
                self._mid_iteration = number + 1 < len(updates)
                self._update_began, self._approximate_kl = time.monotonic(), [0.0, 0.0]
                for places in experience.micro_batches(
                    rows, order[part * size : (part + 1) * size], args.num_generations,
                    args.per_device_train_batch_size, args.process_index, args.world_size,
                ):  # fmt: skip
                    yield experience.select(rows, places)
                if not self._mid_iteration:
                    break  # the last update, or the policy has moved far enough

    def _collect(self) -> Columns:
        """Write, judge and share the completions of the next iteration; report them."""
        self.roll_call("rollout", self.iteration + 1, self.completions_per_iteration)
        share = self.completions_per_iteration // self.args.world_size
        mine = range(share * self.args.process_index, share * (self.args.process_index + 1))
        prompts = self._prompts_of(self.iteration)
        rows, texts = self._assess(
            [self.train_dataset[prompts[place // self.args.num_generations]] for place in mine],
            list(mine),
            self.iteration,
        )
        rows = experience.share(rows, self.accelerator)
        if SOURCE_PARTS in self.train_dataset.column_names:
            parts = self.train_dataset.select_columns([SOURCE_PARTS])[prompts][SOURCE_PARTS]
            self.tally_sources(torch.tensor(parts))  # every rank tallies all prompts: the share is the same
        scores_N = self._final_scores(rows)
        found = experience.learn_from(rows, scores_N, self.kl_coef.beta, self.shaping)
        self._report(rows, found)
        self._show(rows, texts)
        self.kl_coef.update(found["kl"], len(scores_N))
        self.iteration += 1
        self.written += 1
        return rows

    def _prompts_of(self, iteration: int) -> list[int]:
        """Return the prompts of an iteration: the next ones of endless passes over the data, each in its own order."""
        count, size = self.completions_per_iteration // self.args.num_generations, len(self.train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        found: list[int] = []
        for place in range(iteration * count, (iteration + 1) * count):
            epoch, at = divmod(place, size)
            found.append(self._pass(epoch, seed)[at])
        return found

    def _pass(self, epoch: int, seed: int) -> Sequence[int]:
        if self.args.train_sampling_strategy == "sequential":
            return range(len(self.train_dataset))
        if getattr(self, "_drawn", (None, None))[0] != epoch:
            self._drawn = (epoch, experience.order(len(self.train_dataset), seed=seed, iteration=epoch, epoch=0))
        return self._drawn[1]

    def _assess(
        self, prompts: Sequence[Mapping[str, Any]], numbers: Sequence[int], iteration: int
    ) -> tuple[Columns, list[str]]:
        """Return this rank's completions to `prompts` with log-probabilities, values and scores, and their texts.

        `numbers` tell the rows of an iteration apart; as many prompts on each rank, for ZeRO-3 gathers together.
        """
        args, began = self.args, time.monotonic()
        self.heart.beat("rollout")
        draws = draws_for(numbers, args.response_length, seed=args.seed, iteration=iteration)
        with spent.during("rollout"):
            written = self.writer.write([row["prompt_ids"] for row in prompts], draws)
        self.seconds["rollout"] += time.monotonic() - began
        began = time.monotonic()
        self.heart.beat("rollout")
        with spent.during("score"):
            rows = self.assess(self.model_wrapped, prompts, written)
        self.seconds["score"] += time.monotonic() - began
        return rows, self.assess.texts(written)

    def _final_scores(self, rows: Columns) -> Tensor:
        """Return the scores that enter the advantages: normalised, and charged where a completion does not end."""
        scores_N = rows["scores"]
        if self.args.normalise_rewards:
            self.moments.update(scores_N)
            scores_N = self.moments.normalised(scores_N)
        if self.args.missing_eos_penalty is not None:
            scores_N = scores_N - self.args.missing_eos_penalty * ~rows["ended"]
        return scores_N

    # --- report ---

    def _report(self, rows: Columns, found: Mapping[str, float]) -> None:
        """Tally what an iteration found; every rank knows all rows, so every rank tallies the same."""
        lengths_N = rows["loss_mask"].sum(1).float()
        gap = ((rows["writer_logps"] - rows["logps"]) * rows["loss_mask"][:, 1:]).abs().max()
        means = {
            **found,
            "reward": float(rows["scores"].mean()),
            "kl_coef": self.kl_coef.beta,
            "policy/entropy": float(rows["entropy"].sum() / lengths_N.sum()),
            "completions/length": float(lengths_N.mean()),
            "completions/eos_rate": float(rows["ended"].float().mean()),
            "completions/distinct": experience.distinct_share(rows, self.args.num_generations),
            "rollout/logp_gap": float(gap),
            "iteration": float(self.iteration + 1),
        }
        if len(self.assess.rewards.judges) > 1:
            each = rows["each_score"].mean(0).tolist()
            means |= {f"reward/{name}": mean for name, mean in zip(self.assess.rewards.names, each, strict=True)}
        self.tallies.add({name: (value, 1) for name, value in means.items()})

    def _show(self, rows: Columns, texts: Sequence[str]) -> None:
        """Append a few of the iteration's completions to `samples.jsonl` in the run's folder."""
        if self.args.process_index:
            return
        tokenizer: Any = self.processing_class
        with (Path(self.args.output_dir) / SAMPLES).open("a", encoding="utf-8") as stream:
            for row in range(min(self.args.num_sample_completions, len(texts))):
                prompt = rows["input_ids"][row][: int(rows["loss_mask"][row].argmax())]
                line = {
                    "step": self.state.global_step,
                    "iteration": self.iteration + 1,
                    "prompt": tokenizer.decode(prompt),
                    "completion": texts[row],
                    "ended": bool(rows["ended"][row]),
                    "reward": float(rows["scores"][row]),
                    "kl": float(rows["kl"][row].sum()),
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")

    def closing_lines(self) -> list[str]:
        parts = ", ".join(f"{part} {seconds / max(1, self.written):.2f} s" for part, seconds in self.seconds.items())
        return [f"an iteration: {parts}; some of what was written: {Path(self.args.output_dir) / SAMPLES}"]

    # --- update ---

    def batch_loss(self, model: nn.Module, batch: Mapping[str, Any], step: Tensor | None) -> BatchLoss:
        args = self.args
        asked: dict[str, Any] = {"temperature": args.temperature, "entropy": args.entropy_coef != 0}
        tokens, values_BT = tokens_and_values(model, batch, routers=self.router_coefficient != 0, **asked)
        self.charging(tokens)
        mask_BT = tokens.mask_BT
        policy = policy_loss(tokens.logps_BT, batch["logps"], batch["advantages"], mask_BT, args.cliprange)
        value = value_loss(values_BT, batch["values"], batch["returns"], mask_BT, args.cliprange_value)
        total = policy.total + args.vf_coef * value.total
        if tokens.entropy_BT is not None:
            total = total - args.entropy_coef * tokens.entropy_BT.sum()
        count = mask_BT.sum()
        losses = {"loss/policy": (policy.total.detach(), count), "loss/value": (value.total.detach(), count)}
        drift, tokens_seen = policy.tallies["policy/approx_kl"]
        self._approximate_kl[0] += float(drift)
        self._approximate_kl[1] += float(tokens_seen)
        return BatchLoss(total, count, {**losses, **policy.tallies, **value.tallies})

    def answers(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return log-probabilities, and what the value head reads: a fresh one of zeros gives 0 to anything."""
        tokens = token_logps(model, batch, temperature=self.args.temperature)
        return torch.cat([tokens.logps_BT[..., None], value_states(model, batch)], dim=-1)

    def counts(self, batch: Mapping[str, Any]) -> list[int]:
        return [int(batch["loss_mask"][:, 1:].sum())]

    def _marked(self, batch: dict[str, Any], index: int, per_rank: int, items: int) -> dict[str, Any]:
        return batch  # an iteration's rows divide evenly, none is repeated

    def _batches_skipped(self) -> int:
        return 0

    def after_update(self) -> bool:
        """Tell whether the iteration goes on after this optimizer step; called once on every rank.

        It ends early where the policy has moved further than `early_stop_kl` from the one that wrote (nats per
        token, estimator k3).
        """
        self.seconds["update"] += time.monotonic() - self._update_began
        if self._mid_iteration and self.args.early_stop_kl is not None:
            moved = self.accelerator.reduce(torch.tensor(self._approximate_kl, device=self.args.device), "sum")
            stops = float(moved[0] / moved[1].clamp(min=1)) > self.args.early_stop_kl
            self.tallies.add({"policy/stopped_early": (float(stops), 1)})
            self._mid_iteration = not stops
        return self._mid_iteration

    def before_first_step(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Step-0 identity: the ratio to the policy that wrote is 1, and so is that to the reference."""
        model.train()  # as the update will be, so that what dropout would change shows
        with torch.no_grad():
            now = token_logps(model, batch, temperature=self.args.temperature)
        wrote_B, held = batch["logps"].sum(1), self.frozen["reference"]
        moved, same = largest_gap(self, now.logps_BT.sum(1), wrote_B)
        if not same:
            raise UserError(
                f"step-0 identity failed: before any update log-ratios to the policy that wrote are up to {moved:.4g}, "
                "not 0; set disable_dropout: true, or look at the precision"
            )
        said = f"ratio 1 within {moved:.1g}"
        if not held.identity.differs:
            slack = held.token_error * now.mask_BT.sum(1)
            gap, same = largest_gap(self, wrote_B, batch["reference_logps"].sum(1), slack)
            if not same:
                raise UserError(
                    f"step-0 identity failed: before any update the policy's log-ratio to its reference is up to "
                    f"{gap:.4g}, not 0; the reference ({held.identity.name}, digest {held.identity.digest[:12]}) is "
                    "not what the policy starts from; set reference_differs: true if that is meant"
                )
            said += f", KL to the reference 0 within {gap:.1g}"
        self.passed(f"the policy starts as it wrote: {said}")

    # --- evaluation ---

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Write one completion to each evaluation prompt, with the same draws every time, and judge them."""
        dataset, args, tallies = dataloader.dataset, self.args, Tallies()
        share = -(-len(dataset) // args.world_size)
        mine = range(share * args.process_index, share * (args.process_index + 1))
        places = [min(place, len(dataset) - 1) for place in mine]  # repeats, so that every rank has as many
        spent = dict(self.seconds)
        rows, _ = self._assess([dataset[place] for place in places], places, EVALUATION)
        self.seconds = spent  # an evaluation is no part of an iteration
        kept = torch.tensor([place < len(dataset) for place in mine], device=rows["scores"].device)
        kl_N = ((rows["logps"] - rows["reference_logps"]) * rows["loss_mask"][:, 1:]).sum(1)
        columns = {"reward": rows["scores"], "kl": kl_N, "length": rows["loss_mask"].sum(1), "eos_rate": rows["ended"]}
        tallies.add({name: ((values.float() * kept).sum(), kept.sum()) for name, values in columns.items()})
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in tallies.drain(self.accelerator).items()}
        return EvalLoopOutput(None, label_ids=None, metrics=metrics, num_samples=len(dataset))  # type: ignore[arg-type]

    # --- resume ---

    def extra_state(self) -> dict[str, Any]:
        return {
            **super().extra_state(),
            "iteration": self.iteration,
            "kl_coef": self.kl_coef.state_dict(),
            "moments": self.moments.state_dict(),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state(state)
        self.iteration = int(state["iteration"])
        self.kl_coef.load_state_dict(state["kl_coef"])
        self.moments.load_state_dict(state["moments"])

    def put_samples_aside(self) -> None:
        """Take out of `samples.jsonl` what a run that goes on will write again."""
        if self.args.process_index == 0:
            samples = Path(self.args.output_dir) / SAMPLES
            put_aside(samples, lambda line: line["iteration"] <= self.iteration)


def _completions(args: Any) -> int:
    step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    return int(step * args.num_mini_batches)


def _rollout_placement(args: Any, known: Known) -> dict[str, tuple[Any, str]]:
    """Choose where completions are written: both places cost the same time, a copy keeps its memory."""
    if args.rollout_placement != "auto":
        return {}
    size = copy_bytes(known.policy.policy) / 1e6
    return {"rollout_placement": (GATHERED, f"{size:,.1f} MB on each rank while it writes; a copy would keep them")}
