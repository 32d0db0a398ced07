"""Learning from answers that the model itself writes: what PPO, GRPO and their like share.

A buffer is a number of answers to prompts, written by the engine as the model is then, and scored. The trainer then
makes its own log-probabilities of the answers' tokens, so that the ratio π / π_old is 1 before the first update, and
compares them with the engine's: if sampler and trainer disagree, every gradient is of another policy than the one that
wrote (TRL issues 3867 and 4772 are about that). All of it is in the checkpoint that is written at once.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int
from pydantic import model_validator
from torch import Tensor, nn

from groundup.alignment import losses
from groundup.alignment.heads import HEAD_FOLDER
from groundup.alignment.lora import AdapterSettings, adapters_off, merged
from groundup.alignment.losses import aggregate, aggregate_count, kl_estimate, logprobs_head, sequence_logprobs
from groundup.alignment.method import AlignmentMethod, Inputs, reported, share, share_with_error
from groundup.alignment.packing import COLUMNS
from groundup.alignment.reward import Scorer
from groundup.alignment.rewards import (
    VERIFIER_VERSION,
    VERIFY,
    FunctionReward,
    Prompt,
    Prompts,
    is_right,
    load_prompts,
)
from groundup.errors import DataError, GroundupError
from groundup.files import file_digest, value_digest, write_text
from groundup.generation import Engine, SamplingParams
from groundup.generation.rollouts import Rollouts, roll_out, use_calculator
from groundup.interop.start import starting_config
from groundup.model import ModelConfig, Transformer, reshaped
from groundup.recipe import AlignSettings, OptimizerName, OptimizerSettings, Section, Texts, setting
from groundup.shards import Permutation
from groundup.shards.order import shuffled_epochs
from groundup.stage import Check, Context, Stage, graph, model_digest
from groundup.tokenizer import Tokenizer
from groundup.training import IGNORED, Batch, Term, TrainingJob, pass_flops
from groundup.training.checkpoint import load_weights, weights_of
from groundup.training.objective import longest_first
from groundup.user_code import function_fingerprint, load_function

STAT = "stat_"
"""Columns of a buffer that are only reported: a figure of each row, or of the buffer; NaN: none."""
MOST_GAP, MOST_MEAN_GAP = 1e-4, 0.05
"""Between the engine's log-probabilities and the trainer's: the largest in float32, the mean in bfloat16."""
PASS_ROWS = 32
"""Of a forward pass without gradients."""
TokenLosses: TypeAlias = tuple[losses.TokenStatistics, losses.PolicyLoss, dict[str, losses.Tokens]]


class AnswerSettings(Section):
    """How answers are written, and what they are worth."""

    reward: str = setting(
        VERIFY,
        'what an answer is worth: groundup:verify, a stage that makes a reward model, or "my_reward.py:score"',
        min_length=1,
    )
    reward_seconds: float = setting(10.0, "after which a reward function has failed for an answer", gt=0.0)
    reward_process: bool = setting(False, "call a reward function in a process of its own, which may die or hang")
    max_tokens: int = setting(32, "most tokens of an answer", ge=1)
    temperature: float = setting(1.0, "at which answers are written, and their probabilities taken", gt=0.0, le=100.0)


class OnPolicySettings(AlignSettings, AnswerSettings, AdapterSettings, OptimizerSettings):
    """What every method can be told that learns from its own answers."""

    rates_follow_size: ClassVar[bool] = False
    without = ("label_smoothing", "z_loss", "eval_tokens", "keep_best")  # of other losses, and of a held-out one

    optimizer: OptimizerName = setting("adamw", "adamw, muon, lion or adafactor")
    lr: float = setting(1e-5, "peak learning rate of all but Muon (small models: 1e-4 and more)", gt=0.0, le=1.0)
    weight_decay: float = setting(0.0, "decoupled weight decay, on matrices only", ge=0.0, le=10.0)
    data: Texts = setting(
        ("groundup:tasks",), "prompts: conversations (their last answers are the known ones), or groundup:tasks",
        min_length=1,
    )  # fmt: skip
    examples: int = setting(10_000, "prompts that groundup:tasks generates", ge=100, le=10_000_000)
    rollouts: int = setting(96, "answers in a buffer", ge=1)
    buffers: int = setting(30, "how many buffers are made", ge=1)
    epochs: int = setting(1, "passes over each buffer", ge=1)
    missing_end: float = setting(0.0, "taken from the reward of an answer that does not end in time", ge=0.0)
    held_out: int = setting(64, "held-out prompts that are answered now and then, without learning from them", ge=0)
    held_out_every: int = setting(5, "buffers between two of those times", ge=1)

    @model_validator(mode="after")
    def _whole_batches(self) -> OnPolicySettings:
        if self.rollouts % self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide rollouts {self.rollouts}: each answer is learned from "
                "as often as the others"
            )
        if self.batch_warmup_from is not None:
            raise ValueError("batch_warmup_from: a buffer serves batches of one size; leave it unset")
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora dropout {self.lora.dropout:g}: the policy that learns would be another one than the one that "
                "wrote, their ratio not 1; leave it unset"
            )
        return self

    @property
    def buffer_rows(self) -> int:
        """What a buffer's answers make: a row each, unless a method learns from several at once."""
        return self.rollouts

    @property
    def steps_per_buffer(self) -> int:
        """Optimizer steps that learn from one buffer."""
        return self.epochs * self.buffer_rows // self.batch_size


class OnPolicyAlgorithm:
    """An algorithm: which rows its buffers have, and what is minimized over them (`OnPolicySource`, `Objective`).

    A subclass gives `learn_from`, `weights` and `token_losses`.

    Args:
        inputs: of the stage.
        prompts: to answer; each is met once before any is met again.
        reward: a function, or a model.

    Attributes:
        n_models: that are trained, each as large as the policy.
    """

    n_models: int = 1
    _is_first = False

    def __init__(self, inputs: Inputs, prompts: Prompts, reward: FunctionReward | nn.Module) -> None:
        self.inputs, self.settings, self.prompts, self.reward = inputs, inputs.settings, prompts, reward
        self.buffer_rows: int = self.settings.buffer_rows
        self.group: int = getattr(self.settings, "group", 1)  # answers to each prompt
        longest = max(len(prompt.ids) for prompt in (*prompts.train, *prompts.held_out))
        self.width: int = longest + self.settings.max_tokens  # tokens in a row
        ids = [prompt.ids for prompt in prompts.train]
        self.fingerprint = value_digest([inputs.tokenizer.fingerprint, inputs.seed, self.group, inputs.start, ids])

    # What an algorithm gives

    def learn_from(self, modules: Mapping[str, Any], batch: Batch, reference: Tensor, last: Batch) -> Batch:
        """The rows to learn from, of answers that are there: advantages, and what else the losses need.

        Args:
            modules: all of the job.
            batch: of this process's answers `ids`, `targets`, `rewards`, `old`, and figures (`STAT`).
            reference: log-probabilities of their tokens, (answers, seq), of the model that the stage started from.
            last: the buffer before.
        """
        raise NotImplementedError

    @property
    def weights(self) -> dict[str, float]:
        """Of the losses by name, in what is minimized: of "policy", and of those beside it."""
        raise NotImplementedError

    def token_losses(self, modules: Mapping[str, Any], batch: Batch, mask: losses.Mask) -> TokenLosses:
        """The policy's pass over a minibatch, its loss, and those beside it, of each token."""
        raise NotImplementedError

    # What is minimized

    @property
    def aggregation(self) -> losses.Aggregation:
        """How the losses of tokens become one: their mean, unless the settings say otherwise."""
        return getattr(self.settings, "aggregation", "dapo")

    def counts(self, batch: Batch) -> dict[str, float]:
        """Of the losses, tokens of answers, and rows that have a figure."""
        mask = batch["targets"] != IGNORED
        count = aggregate_count(mask, self.aggregation, self.settings.max_tokens)
        shown = dict.fromkeys(("entropy", "clipped"), int(mask.sum()))
        return {**dict.fromkeys(self.weights, count), **shown, **stat_counts(batch)}

    def terms(self, modules: Mapping[str, Any], batch: Batch) -> dict[str, Term]:
        """The losses, entropy, the share of tokens that are clipped, and the buffer's figures.

        Raises:
            GroundupError: something has moved between a buffer's making and its first minibatch: the ratio is not 1.
        """
        stats = stat_terms(batch)
        batch = trimmed(batch)
        mask = batch["targets"] != IGNORED
        found, policy, others = self.token_losses(modules, batch, mask)
        if modules["model"].training and self._is_first and bool(mask.any()):
            gap = float((found.logprobs.detach() - batch["old"]).abs()[mask].max())
            most = MOST_GAP if modules["model"].compute_dtype == torch.float32 else 0.5
            if not gap <= most:
                raise GroundupError(
                    "before the first update the ratio to the policy that wrote is not 1: log-probabilities differ by "
                    f"{gap:.2g} (at most {most:g}).",
                    "Does the model draw at random in training (dropout)? Set [model] dropout = 0.",
                )
        each = {"policy": policy.losses, **others}
        sums = {name: aggregate(each[name], mask, self.aggregation) for name in self.weights}
        terms = {name: Term(total, total.detach(), self.weights[name]) for name, total in sums.items()}
        entropy, clipped = found.entropy.where(mask, 0.0).sum(), (policy.is_clipped & mask).sum()
        return terms | reported(entropy=entropy, clipped=clipped) | stats

    def flops(self, config: ModelConfig, lengths: Sequence[int]) -> float:
        """A forward and a backward pass of what is trained."""
        return self.n_models * pass_flops(config, lengths)

    # Buffers

    def is_due(self, place: int) -> bool:
        """Before the first batch that learns from it."""
        return place % self.settings.steps_per_buffer == 0

    def minibatch(self, place: int, n_rows: int) -> Int[Tensor, " n_rows"]:
        """Each epoch takes every row once, in another order."""
        number = place % self.settings.steps_per_buffer
        self._is_first = number == 0
        epoch, part = divmod(number, self.buffer_rows // n_rows)
        order = Permutation(self.buffer_rows, (self.inputs.seed, place - number, epoch))
        return torch.from_numpy(order(np.arange(part * n_rows, (part + 1) * n_rows)))

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Batch]:
        """None: held-out prompts are answered when a buffer is made."""
        yield from ()

    def collect(self, modules: Mapping[str, Any], place: int, rows: slice, last: Batch) -> tuple[Batch, float]:
        """These rows of a new buffer, and how many FLOPs they took."""
        model, settings, seed = modules["model"], self.settings, self.inputs.seed
        per_row = settings.rollouts // self.buffer_rows
        numbers = np.arange(rows.start * per_row, rows.stop * per_row)
        asked = (place // settings.steps_per_buffer * settings.rollouts + numbers) // self.group
        prompts = [self.prompts.train[index] for index in shuffled_epochs(asked, len(self.prompts.train), seed)]
        seeds = [answer_seed(seed, place, number) for number in numbers]
        with merged(model):
            engine = self._engine(model)
            rolled = self._roll_out(engine, prompts, seeds, settings.temperature)
            held_out = self._held_out(engine, place)
        rewards = self._rewards(prompts, rolled)
        if isinstance(self.reward, FunctionReward) and bool(self.inputs.world.gather(rewards).isnan().all()):
            raise self.reward.all_failed()
        targets = rolled.ids.where(rolled.is_answer, IGNORED)[:, 1:]
        batch = {"ids": rolled.ids, "targets": targets, "rewards": rewards}
        batch["old"], gap = self._own_logprobs(model, batch, rolled.logprobs[:, 1:])
        reference = reference_logprobs(modules, batch, settings.temperature)
        stats = {
            "reward": rewards.clone(), "reward_failed": rewards.isnan().float(), "ended": rolled.is_ended.float(),
            "answer_tokens": rolled.is_answer.sum(1).float(),
            # Σ_t log π_old − log π_ref of each answer: its mean is the KL divergence to the start
            "kl": sequence_logprobs(kl_estimate(batch["old"], reference), targets != IGNORED),
            "logprob_gap": torch.full_like(rewards, gap),
            **{name: torch.full_like(rewards, float(each.nanmean())) for name, each in held_out.items()},
        }  # fmt: skip
        batch |= {STAT + name: values for name, values in stats.items()}
        self._keep(place, prompts, rolled, rewards)
        # The policy writes, what is trained reads, and so does the reference.
        flops = answer_flops(rolled.lengths.tolist(), model.config, 2 + self.n_models, self.reward)
        return self.learn_from(modules, batch, reference, last), flops

    def final(self, model: Transformer) -> dict[str, float]:
        """What held-out prompts earn at the end, with standard errors, and how much was written."""
        found: dict[str, float] = {}
        with torch.no_grad(), merged(model):
            asked = self._held_out(self._engine(model), 0)
        for name, values in asked.items():
            earned = values[~values.isnan()].double().numpy()
            found |= {**(share_with_error(name, earned) if len(earned) else {}), "held_out_n": len(values)}
        written = self.settings.buffers * self.settings.rollouts
        counts = {"prompts": len(self.prompts.train), "prompts_too_long": self.prompts.too_long, "answers": written}
        return found | counts

    def _engine(self, model: Transformer) -> Engine:
        """Over a model that this process can run by itself: of a sharded one, a copy; every process must call it."""
        whole, world = model, self.inputs.world
        if world.size > 1:
            whole = Transformer(model.config, device="meta").to_empty(device=world.device)
            load_weights(whole, weights_of(model))
            whole.compute_dtype = model.compute_dtype
        return Engine(whole, self.inputs.tokenizer, slots=min(self.buffer_rows, 64), dtype=model.compute_dtype)

    def _roll_out(
        self, engine: Engine, prompts: Sequence[Prompt], seeds: Sequence[int | None], temperature: float
    ) -> Rollouts:
        params = SamplingParams(temperature=temperature, max_tokens=self.settings.max_tokens)
        ids, pad_id = [prompt.ids for prompt in prompts], self.inputs.tokenizer.pad_id
        tool = use_calculator(self.inputs.tokenizer)
        return roll_out(engine, ids, params, seeds, width=self.width, pad_id=pad_id, use_tool=tool)

    def _own_logprobs(
        self, model: Transformer, batch: Batch, theirs: Float[Tensor, "rows seq"]
    ) -> tuple[Float[Tensor, "rows seq"], float]:
        """The trainer's log-probabilities, and how far the engine's are from them, both at temperature 1.

        Raises:
            GroundupError: too far: then the gradients would be of another policy than the one that wrote.
        """
        old = plain = buffer_logprobs(model, batch, self.settings.temperature)
        if self.settings.temperature != 1:
            plain = buffer_logprobs(model, batch, 1.0)
        gaps = (plain - theirs).abs()[batch["targets"] != IGNORED]
        mean = float(gaps.mean())
        gap, most = (float(gaps.max()), MOST_GAP) if model.compute_dtype == torch.float32 else (mean, MOST_MEAN_GAP)
        if not gap <= most:
            raise GroundupError(
                f"the engine's log-probabilities of the answers are {gap:.2g} away from the trainer's (at most "
                f"{most:g}): it would learn from another policy than the one that wrote.",
                'Set precision = "float32"; if that does not help, please report it.',
            )
        return old, mean

    def _rewards(self, prompts: Sequence[Prompt], rolled: Rollouts) -> Float[Tensor, " rows"]:
        return scores_of(self.reward, prompts, rolled) - self.settings.missing_end * (~rolled.is_ended)

    def _held_out(self, engine: Engine, place: int) -> dict[str, Float[Tensor, " prompts"]]:
        """How each held-out prompt is answered, by its most probable answer: by the reward, and by what is known."""
        settings, world = self.settings, self.inputs.world
        n = min(settings.held_out, len(self.prompts.held_out)) // world.size * world.size
        if not n or place // settings.steps_per_buffer % settings.held_out_every:
            return {}
        prompts = self.prompts.held_out[world.rows(n)]
        rolled = self._roll_out(engine, prompts, [0] * len(prompts), 0.0)
        found = {"held_out_reward": world.gather(self._rewards(prompts, rolled))}
        if settings.reward != VERIFY and any(prompt.known for prompt in prompts):
            right = [float(is_right(prompt, text)) for prompt, text in zip(prompts, rolled.texts, strict=True)]
            found["held_out_right"] = world.gather(torch.tensor(right) * rolled.is_ended)
        return found

    def _keep(self, place: int, prompts: Sequence[Prompt], rolled: Rollouts, rewards: Tensor) -> None:
        """A few answers, to be read: those of buffers that are made again are replaced."""
        if not self.inputs.world.is_first:
            return
        path = self.inputs.out / "rollouts.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        lines = [line for line in lines if json.loads(line)["step"] < place]
        rows = zip(prompts[:8], rolled.ids.tolist(), rolled.is_answer.tolist(), rolled.lengths.tolist(), strict=False)
        for (prompt, ids, is_own, length), reward in zip(rows, rewards.tolist(), strict=False):
            # A call of a tool, what that says, and the answer to it, one below the other
            turns = itertools.groupby(range(len(prompt.ids), length), key=is_own.__getitem__)
            text = "\n".join(self.inputs.tokenizer.decode(ids[n] for n in turn) for _, turn in turns)
            record: dict[str, Any] = {"step": place, "prompt": prompt.messages[-1]["content"], "answer": text}
            record["reward"] = None if math.isnan(reward) else reward
            lines.append(json.dumps(record, ensure_ascii=False))
        write_text(path, "".join(f"{line}\n" for line in lines))


def answer_seed(*key: object) -> int:
    """A seed of its own for every answer."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, key)).encode()) >> 1


@torch.no_grad()
def scores_of(
    reward: FunctionReward | nn.Module, prompts: Sequence[Prompt], rolled: Rollouts
) -> Float[Tensor, " rows"]:
    """What answers earn: by a function, or by a reward model, which reads them up to their ends.

    An answer that was cut off is not right, whatever it says so far: evaluation counts it so, too.
    """
    if isinstance(reward, FunctionReward):
        found = torch.tensor(reward(prompts, rolled.texts), dtype=torch.float32)
        return found * rolled.is_ended if reward.is_verification else found
    device, found = next(reward.parameters()).device, torch.empty(len(prompts))
    for rows in torch.split(rolled.lengths.argsort(stable=True, descending=True), PASS_ROWS):
        n = rolled.lengths[rows]
        width = -(-int(n[0]) // COLUMNS) * COLUMNS
        found[rows] = reward(rolled.ids[rows, :width].to(device), n.to(device)).float().cpu()
    return found


def answer_flops(
    lengths: Sequence[int], config: ModelConfig, n_passes: int, reward: FunctionReward | nn.Module | None = None
) -> float:
    """FLOPs of forward passes over prompts with their answers, of so many tokens, and of one more by a reward model."""
    scorers = reward.modules() if isinstance(reward, nn.Module) else []
    passes = [config] * n_passes + [module.config for module in scorers if isinstance(module, Transformer)]
    return sum(pass_flops(each, lengths) for each in passes) / 3


def trimmed(batch: Batch) -> Batch:
    """The same rows without the columns that are padding in all of them; so that widths are few (`COLUMNS`)."""
    used = (batch["targets"] != IGNORED).flatten(0, -2).any(0).nonzero().flatten().tolist()
    last = (max(used, default=0) // COLUMNS + 1) * COLUMNS  # none is used where no answer has a reward
    more = {"ids": batch["ids"].shape[-1] - batch["targets"].shape[-1]}
    return {name: t[..., : last + more.get(name, 0)] if t.dim() > 1 else t for name, t in batch.items()}


def in_passes(batch: Batch, of_pass: Callable[[Batch], Tensor]) -> Float[Tensor, "rows seq"]:
    """What passes without gradients say of each target of a buffer, rows of about one length together; else 0.

    Every process, whose shares are equally large, makes as many.
    """
    found = torch.zeros(batch["targets"].shape)
    for rows in torch.split(longest_first(batch), PASS_ROWS):
        one = of_pass(trimmed({name: batch[name][rows] for name in ("ids", "targets")}))
        found[rows, : one.shape[1]] = one.cpu()
    return found


def buffer_logprobs(model: nn.Module, batch: Batch, temperature: float) -> Float[Tensor, "rows seq"]:
    """Log-probability of each target of a buffer."""
    device = next(model.parameters()).device

    def of_pass(part: Batch) -> Tensor:
        head = logprobs_head(part["targets"].to(device), temperature)
        found: Tensor = model(part["ids"].to(device)[:, :-1], head=head).logprobs
        return found

    return in_passes(batch, of_pass)


def reference_logprobs(modules: Mapping[str, Any], batch: Batch, temperature: float) -> Float[Tensor, "rows seq"]:
    """The same of the model that the stage started from: a frozen copy, or this one with its adapters off."""
    if "reference" in modules:
        return buffer_logprobs(modules["reference"], batch, temperature)
    with adapters_off(modules["model"]):
        return buffer_logprobs(modules["model"], batch, temperature)


def without_dropout(model: Transformer) -> Transformer:
    """The same weights in a model that draws nothing at random: the policy that writes is the one that learns."""
    if not model.config.dropout:
        return model
    plain = Transformer(reshaped(model.config.to_dict(), {"dropout": 0.0}), device="meta")
    plain.load_state_dict(model.state_dict(), assign=True)
    return plain


def stat_counts(batch: Batch) -> dict[str, float]:
    """Rows that have each of the figures that are only reported."""
    return {name.removeprefix(STAT): int((~t.isnan()).sum()) for name, t in batch.items() if name.startswith(STAT)}


def stat_terms(batch: Batch) -> dict[str, Term]:
    """Their sums."""
    sums = {name.removeprefix(STAT): t.nan_to_num(0.0).sum() for name, t in batch.items() if name.startswith(STAT)}
    return reported(**sums)


class AnswersMethod(AlignmentMethod):
    """A method that has the model answer prompts, and rewards the answers."""

    def starting_point(self, context: Context) -> tuple[Transformer, Tokenizer]:
        """A model that draws nothing but its answers."""
        model, tokenizer = super().starting_point(context)
        return without_dropout(model), tokenizer

    def given(self, context: Context) -> dict[str, Any]:
        """A reward model that another stage makes, and what stands for the weights of model and reward."""
        stage, name, given = context.stage, context.stage.settings.reward, super().given(context)
        started = [model_digest(stage.outside_start or context.run.folder(stage.settings.start) / "model")]
        if name in stage.recipe.branches:
            folder = context.run.folder(name)
            started += [model_digest(folder / "model"), *map(file_digest, sorted((folder / HEAD_FOLDER).iterdir()))]
            given["reward"] = Scorer.load(folder)
        else:
            own = f"{VERIFY} {VERIFIER_VERSION}"
            started.append(own if name == VERIFY else function_fingerprint(name, _where(stage)))
        return {**given, "start": value_digest(started)}

    def prompts_and_reward(
        self, inputs: Inputs, prompts: Prompts | None, reward: FunctionReward | nn.Module | None
    ) -> tuple[Prompts, FunctionReward | nn.Module]:
        """Those that are given, or those that the settings name.

        Raises:
            DataError: no prompts, no such function, or a reward model of another tokenizer.
        """
        settings = inputs.settings
        if prompts is None:
            room = inputs.model.config.context_length - settings.max_tokens
            prompts = load_prompts(
                settings.data, settings.examples, inputs.seed, inputs.tokenizer, room, inputs.section, inputs.console
            )
        if reward is None:
            where, seconds = f"[{inputs.section}] reward = {settings.reward!r}", settings.reward_seconds
            reward = FunctionReward(settings.reward, where, seconds=seconds, own_process=settings.reward_process)
        if isinstance(reward, Scorer) and reward.tokenizer.fingerprint != inputs.tokenizer.fingerprint:
            raise DataError(
                f"[{inputs.section}] reward = {settings.reward!r}: the reward model has another tokenizer than the "
                "model that answers, whose ids it would read.",
                "Start both stages from models of one tokenizer.",
            )
        return prompts, reward

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """The reward model, where a stage of the run makes it."""
        own = (stage.settings.reward,) if stage.settings.reward in stage.recipe.branches else ()
        return (*own, *super().needs(stage))

    def outside(self, stage: Stage) -> dict[str, str]:
        """Prompts, a model made elsewhere, a reward's file; the verifier, which judges held-out answers, too."""
        name, found = stage.settings.reward, {"verifier": str(VERIFIER_VERSION), **super().outside(stage)}
        if name == VERIFY or name in stage.recipe.branches:
            return found
        return {**found, "reward": function_fingerprint(name, _where(stage))}

    def checks(self, stage: Stage) -> Iterable[Check]:
        """The reward, and room for answers."""
        yield from super().checks(stage)
        yield f"[{stage.section}] reward", lambda: _check_reward(stage)
        yield f"[{stage.section}] max_tokens", lambda: _check_room(stage)


class PolicyMethod(AnswersMethod):
    """A method that learns from its answers buffer by buffer; a subclass names its algorithm."""

    makes = "lm"
    version = 3
    figures: ClassVar[tuple[str, ...]] = ("held_out_reward", "held_out_right")
    algorithm: ClassVar[type[OnPolicyAlgorithm]]
    unit: ClassVar[str] = "tokens"
    facts = (
        ("reward on held-out prompts", "{held_out_reward:.3f} ±{held_out_reward_stderr:.3f}"),
        ("of them right", share("held_out_right")),
        ("prompts", "{prompts:,}"),
        ("answers written", "{answers:,}"),
    )
    lines = ("reward {held_out_reward:.2f}",)

    def modules(self, inputs: Inputs) -> dict[str, nn.Module]:
        """What is trained beside the policy."""
        return {}

    def job(  # type: ignore[override]
        self, inputs: Inputs, *, prompts: Prompts | None = None, reward: FunctionReward | nn.Module | None = None
    ) -> TrainingJob:
        """Prompts and a reward (default: what `settings` name); a model as reward gives (ids, lengths) scores."""
        settings = inputs.settings
        prompts, reward = self.prompts_and_reward(inputs, prompts, reward)
        frozen: dict[str, nn.Module] = {} if settings.lora else {"reference": copy.deepcopy(inputs.model)}
        if isinstance(reward, nn.Module):
            frozen["reward"] = reward
        algorithm = self.algorithm(inputs, prompts, reward)
        n_rows = settings.buffers * settings.steps_per_buffer * settings.batch_size
        return inputs.job(
            algorithm, algorithm, n_rows, beside=self.modules(inputs), frozen=frozen, row_length=algorithm.width,
            row_sequences=self.row_sequences, unit=self.unit,
        )  # fmt: skip

    def measure(self, inputs: Inputs, job: TrainingJob, summary: dict[str, Any]) -> dict[str, Any]:
        """What held-out prompts earn."""
        algorithm: Any = job.source
        return algorithm.final(job.model)

    def quick(self, settings: Any) -> Any:
        """A few buffers."""
        less = {"buffers": min(settings.buffers, 3), "examples": min(settings.examples, 2000)}
        return settings.model_copy(update=less | {"held_out": min(settings.held_out, 16)})


def _where(stage: Stage) -> str:
    return f"[{stage.section}] reward = {stage.settings.reward!r}"


def _check_reward(stage: Stage) -> None:
    name = stage.settings.reward
    if name in stage.recipe.branches:
        if graph(stage.recipe)[name].method.makes != "scorer":
            raise DataError(f"{_where(stage)}: this stage makes no reward model.", 'Name one of method = "reward".')
    elif name != VERIFY:
        load_function(name, _where(stage))


def _check_room(stage: Stage) -> None:
    length = starting_config(stage)[0].context_length
    if stage.settings.max_tokens >= length - 8:
        raise DataError(
            f"[{stage.section}] max_tokens = {stage.settings.max_tokens}: a prompt has no room beside such an "
            f"answer in the model's context of {length}.",
            "Lower it.",
        )
