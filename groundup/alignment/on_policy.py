"""Learning from answers that the model itself writes: what PPO, GRPO and their like share.

A buffer is a number of answers to prompts, written by the engine as the model is then, and scored. The trainer then
makes its own log-probabilities of the answers' tokens, so that the ratio π / π_old is 1 before the first update, and
compares them with the engine's: if sampler and trainer disagree, every gradient is of another policy than the one that
wrote (TRL issues 3867 and 4772 are about that). All of it is in the checkpoint that is written at once.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int
from pydantic import model_validator
from torch import Tensor, nn

from groundup.alignment.heads import HEAD_FOLDER
from groundup.alignment.lora import AdapterSettings, merged
from groundup.alignment.losses import TokenStatistics, kl_estimate, logprobs_head, sequence_logprobs
from groundup.alignment.method import AlignmentMethod, begin, finish, sized
from groundup.alignment.reward import Scorer
from groundup.alignment.rewards import VERIFY, FunctionReward, Prompt, Prompts, RewardModel, is_right, load_prompts
from groundup.console import Console
from groundup.distributed import World, current_world
from groundup.errors import DataError, GroundupError
from groundup.files import file_digest, own_folder, value_digest, write_text
from groundup.generation import Engine, SamplingParams
from groundup.generation.rollouts import Rollouts, roll_out, use_calculator
from groundup.interop.start import starting_config, starting_point
from groundup.model import Transformer, reshaped
from groundup.model.cost import forward_flops
from groundup.recipe import AlignSettings, OptimizerName, OptimizerSettings, Section, Texts, resolve_optimizer, setting
from groundup.report.format import format_lines, format_number, format_whole, training_facts
from groundup.shards import Permutation
from groundup.shards.order import shuffled_epochs
from groundup.stage import Check, Context, Shown, Stage, graph, model_digest
from groundup.tokenizer import Tokenizer
from groundup.training import IGNORED, Batch, Objective, TrainedModel, TrainingJob, forget_checkpoints, train
from groundup.training.checkpoint import load_weights, weights_of
from groundup.training.objective import Term
from groundup.user_code import function_fingerprint, load_function

ROLLOUTS_FILE = "rollouts.jsonl"
STAT = "stat_"
"""Columns of a buffer that are only reported: a figure of each row, or of the buffer; NaN: none."""
MOST_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Between the engine's log-probabilities and the trainer's: the largest in float32, the mean in bfloat16."""
_PASS_ROWS = 32
_AT_ONCE = 64


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
        return self

    @property
    def steps_per_buffer(self) -> int:
        """Optimizer steps that learn from one buffer."""
        return self.epochs * self.rollouts // self.batch_size


class RolloutSource:
    """Buffers of answers, made when they are due; see `training.OnPolicySource`.

    Subclasses say in `learn_from` what else a buffer has.

    Args:
        prompts: to answer; each is met once before any is met again.
        tokenizer: of the model.
        reward: a function, or None: the module "reward" scores.
        settings: of the stage.
        seed: of the order and of the answers.
        world: the processes.
        folder: where answers are kept to be read.
        group: answers to the same prompt.
        start: what stands for the weights of the frozen modules.
    """

    def __init__(
        self, prompts: Prompts, tokenizer: Tokenizer, reward: FunctionReward | None, settings: OnPolicySettings,
        seed: int, world: World, folder: Path, *, group: int = 1, start: str = "",
    ) -> None:  # fmt: skip
        self._prompts, self._tokenizer, self._reward, self.settings = prompts, tokenizer, reward, settings
        self._seed, self._world, self._folder, self._group = seed, world, folder, group
        self.buffer_rows = settings.rollouts
        self.width = max(len(prompt.ids) for side in (prompts.train, prompts.held_out) for prompt in side)
        self.width += settings.max_tokens
        self.is_first = False
        self.fingerprint = value_digest(
            [tokenizer.fingerprint, seed, group, start, [prompt.ids for prompt in prompts.train]]
        )

    def learn_from(self, modules: Mapping[str, nn.Module], batch: Batch, last: Batch) -> tuple[Batch, float]:
        """What else a buffer has, of `ids`, `targets`, `rewards`, `old`; and FLOPs."""
        raise NotImplementedError

    def is_due(self, place: int) -> bool:
        """Before the first batch that learns from it."""
        return place % self.settings.steps_per_buffer == 0

    def minibatch(self, place: int, n_rows: int) -> Int[Tensor, " n_rows"]:
        """Each epoch takes every row once, in another order."""
        number = place % self.settings.steps_per_buffer
        self.is_first = number == 0
        epoch, part = divmod(number, self.buffer_rows // n_rows)
        order = Permutation(self.buffer_rows, (self._seed, place - number, epoch))
        return torch.from_numpy(order(np.arange(part * n_rows, (part + 1) * n_rows)))

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Batch]:
        """None: held-out prompts are answered when a buffer is made."""
        yield from ()

    def collect(self, modules: Mapping[str, nn.Module], place: int, rows: slice, last: Batch) -> tuple[Batch, float]:
        """These rows of a new buffer, and how many FLOPs they took."""
        model, settings = modules["model"], self.settings
        assert isinstance(model, Transformer)
        numbers = range(rows.start, rows.stop)
        prompts = [self._prompt(place, number) for number in numbers]
        with merged(model):
            engine = self._engine(model)
            rolled = self._roll_out(engine, prompts, [self._row_seed(place, number) for number in numbers])
            held_out = self._held_out(modules, engine, place)
        rewards = self._rewards(modules, prompts, rolled) - settings.missing_end * (~rolled.is_ended)
        if self._reward is not None and bool(self._world.gather(rewards).isnan().all()):
            first = f"; the first: {self._reward.failures[0]}" if self._reward.failures else ""
            raise DataError(f"{self._reward.where}: it fails for all answers{first}.")
        targets = rolled.ids.where(rolled.is_answer, IGNORED)[:, 1:]
        batch = {"ids": rolled.ids, "targets": targets, "rewards": rewards}
        batch["old"], gap = self._own_logprobs(model, batch, rolled.logprobs[:, 1:])
        more, flops = self.learn_from(modules, batch, last)
        lengths = rolled.is_answer.sum(1)
        of_all = {"logprob_gap": gap, **held_out}
        stats = {
            "reward": rewards.clone(),
            "reward_failed": rewards.isnan().float(),
            "answer_tokens": lengths.float(),
            "ended": rolled.is_ended.float(),
            **{name: torch.full((len(prompts),), value) for name, value in of_all.items()},
        }
        config, n_rows = model.config, len(prompts)
        flops += n_rows * 2 * forward_flops(config, self.width)  # written, and read again
        self._keep(place, prompts, rolled, rewards)
        return {**batch, **more, **{STAT + name: values for name, values in stats.items()}}, float(flops)

    def final(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        """What held-out prompts earn at the end, and of how many that is the mean."""
        model = modules["model"]
        assert isinstance(model, Transformer)
        with torch.no_grad(), merged(model):
            found = self._held_out(modules, self._engine(model), 0)
        return found | ({"held_out_n": min(self.settings.held_out, len(self._prompts.held_out))} if found else {})

    def _engine(self, model: Transformer) -> Engine:
        whole = whole_model(model, self._world)
        return Engine(whole, self._tokenizer, slots=min(self.buffer_rows, _AT_ONCE), dtype=model.compute_dtype)

    def _prompt(self, place: int, row: int) -> Prompt:
        number = (place // self.settings.steps_per_buffer * self.buffer_rows + row) // self._group
        (index,) = shuffled_epochs(np.array([number]), len(self._prompts.train), self._seed)
        return self._prompts.train[index]

    def _row_seed(self, place: int, row: int) -> int:
        return xxhash.xxh3_64_intdigest(f"{self._seed}/{place}/{row}".encode()) >> 1

    def _roll_out(
        self, engine: Engine, prompts: Sequence[Prompt], seeds: Sequence[int | None], temperature: float | None = None
    ) -> Rollouts:
        settings = self.settings
        params = SamplingParams(
            temperature=settings.temperature if temperature is None else temperature, max_tokens=settings.max_tokens
        )
        ids = [prompt.ids for prompt in prompts]
        tool = use_calculator(self._tokenizer)
        return roll_out(engine, ids, params, seeds, width=self.width, pad_id=self._tokenizer.pad_id, use_tool=tool)

    def _rewards(
        self, modules: Mapping[str, nn.Module], prompts: Sequence[Prompt], rolled: Rollouts
    ) -> Float[Tensor, " rows"]:
        return scores_of(modules["reward"] if self._reward is None else self._reward, prompts, rolled)

    def _own_logprobs(
        self, model: Transformer, batch: Batch, theirs: Float[Tensor, "rows seq"]
    ) -> tuple[Float[Tensor, "rows seq"], float]:
        """The trainer's log-probabilities, and how far the engine's are from them, both at temperature 1.

        Raises:
            GroundupError: too far: then the gradients would be of another policy than the one that wrote.
        """
        kept, plain = [], []
        for part in passes(batch):
            temperatures = dict.fromkeys((self.settings.temperature, 1.0))
            found = [statistics(model, part, temperature).logprobs.cpu() for temperature in temperatures]
            kept.append(found[0])
            plain.append(found[-1])
        gaps = (torch.cat(plain) - theirs).abs()[batch["targets"] != IGNORED]
        largest, mean = float(gaps.max()), float(gaps.mean())
        gap, most = (largest if model.compute_dtype == torch.float32 else mean), MOST_GAP.get(model.compute_dtype, 0.05)
        if not gap <= most:
            raise GroundupError(
                f"the engine's log-probabilities of the answers are {gap:.2g} away from the trainer's (at most "
                f"{most:g}): it would learn from another policy than the one that wrote.",
                'Set precision = "float32"; if that does not help, please report it.',
            )
        return torch.cat(kept), mean

    def _held_out(self, modules: Mapping[str, nn.Module], engine: Engine, place: int) -> dict[str, float]:
        """How held-out prompts are answered, the most probable answers: by the reward, and by what is known."""
        settings, size = self.settings, self._world.size
        n = min(settings.held_out, len(self._prompts.held_out)) // size * size
        if not n or place // settings.steps_per_buffer % settings.held_out_every:
            return {}
        share = self._world.rows(n)
        prompts = self._prompts.held_out[share]
        rolled = self._roll_out(engine, prompts, [0] * len(prompts), temperature=0.0)
        rewards = self._world.gather(self._rewards(modules, prompts, rolled))
        right = [float(is_right(prompt, text)) for prompt, text in zip(prompts, rolled.texts, strict=True)]
        found = {"held_out_reward": float(rewards.nanmean())}
        if settings.reward != VERIFY and any(prompt.known for prompt in prompts):
            found["held_out_right"] = float(self._world.gather(torch.tensor(right)).mean())
        return found

    def _keep(self, place: int, prompts: Sequence[Prompt], rolled: Rollouts, rewards: Tensor) -> None:
        """A few answers, to be read: those of buffers that are made again are replaced."""
        if not self._world.is_first:
            return
        path = self._folder / ROLLOUTS_FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        lines = [line for line in lines if json.loads(line)["step"] < place]
        for prompt, text, reward in list(zip(prompts, rolled.texts, rewards.tolist(), strict=True))[:8]:
            record: dict[str, Any] = {"step": place, "prompt": prompt.messages[-1]["content"], "answer": text}
            record["reward"] = None if math.isnan(reward) else reward
            lines.append(json.dumps(record, ensure_ascii=False))
        write_text(path, "".join(f"{line}\n" for line in lines))


@torch.no_grad()
def scores_of(
    reward: FunctionReward | nn.Module, prompts: Sequence[Prompt], rolled: Rollouts
) -> Float[Tensor, " rows"]:
    """What answers earn: by a function, or by a reward model, which reads them up to their ends."""
    if isinstance(reward, FunctionReward):
        return torch.tensor(reward(prompts, rolled.texts), dtype=torch.float32)
    lengths = rolled.ids.shape[1] - rolled.is_answer.flip(1).int().argmax(1)
    device = next(reward.parameters()).device
    pairs = zip(torch.split(rolled.ids, _PASS_ROWS), torch.split(lengths, _PASS_ROWS), strict=True)
    return torch.cat([reward(ids.to(device), n.to(device)).float().cpu() for ids, n in pairs])


def passes(batch: Batch) -> Iterator[Batch]:
    """A buffer in pieces for forward passes: as many on every process, whose shares are equally large."""
    for first in range(0, len(batch["ids"]), _PASS_ROWS):
        yield {name: values[first : first + _PASS_ROWS] for name, values in batch.items()}


def statistics(model: nn.Module, batch: Batch, temperature: float) -> TokenStatistics:
    """Log-probability of each target and entropy there, of one forward pass."""
    device = next(model.parameters()).device
    ids, targets = batch["ids"].to(device), batch["targets"].to(device)
    return model(ids[:, :-1], head=logprobs_head(targets, temperature))


def reference_logprobs(model: nn.Module, batch: Batch, temperature: float) -> Float[Tensor, "rows seq"]:
    """Of a frozen model, for a whole buffer."""
    return torch.cat([statistics(model, part, temperature).logprobs.cpu() for part in passes(batch)])


def answer_kl(batch: Batch, reference: Float[Tensor, "rows seq"]) -> Float[Tensor, " rows"]:
    """Σ_t log π_old − log π_ref of each answer: its mean is the KL divergence to the start."""
    return sequence_logprobs(kl_estimate(batch["old"], reference), batch["targets"] != IGNORED)


def trimmed(batch: Batch) -> Batch:
    """A minibatch without the columns that are padding in all of its rows."""
    last = int((batch["targets"] != IGNORED).any(0).nonzero().max()) + 1
    cut = {"ids": last + 1}
    return {name: t[:, : cut.get(name, last)] if t.dim() == 2 else t for name, t in batch.items()}


def check_first_ratio(is_first: bool, logprobs: Tensor, old: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
    """Hold that nothing has moved between a buffer's making and its first minibatch.

    Raises:
        GroundupError: the ratio is not 1.
    """
    if not is_first or not bool(mask.any()):
        return
    gap = float((logprobs.detach() - old).abs()[mask].max())
    most = 1e-4 if dtype == torch.float32 else 0.5
    if not gap <= most:
        raise GroundupError(
            f"before the first update the ratio to the policy that wrote is not 1: log-probabilities differ by "
            f"{gap:.2g} (at most {most:g}).",
            "Does the model draw at random in training (dropout)? Set [model] dropout = 0.",
        )


def stat_counts(batch: Batch) -> dict[str, float]:
    """Rows that have each of the figures that are only reported."""
    return {name.removeprefix(STAT): int((~t.isnan()).sum()) for name, t in batch.items() if name.startswith(STAT)}


def stat_terms(batch: Batch) -> dict[str, Term]:
    """Their sums."""
    sums = {name.removeprefix(STAT): t.nan_to_num(0.0).sum() for name, t in batch.items() if name.startswith(STAT)}
    return {name: Term(total, total, weight=0.0) for name, total in sums.items()}


def whole_model(model: Transformer, world: World) -> Transformer:
    """A model that this process can run by itself: of a sharded one, a copy (every process must call it)."""
    if world.size == 1:
        return model
    copy = Transformer(model.config, device="meta").to_empty(device=world.device)
    load_weights(copy, weights_of(model))
    copy.compute_dtype = model.compute_dtype
    return copy.eval()


def train_policy(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Prompts,
    reward: FunctionReward | nn.Module,
    settings: OnPolicySettings,
    *,
    source: Callable[..., RolloutSource],
    objective: Callable[[RolloutSource], Objective],
    trained: Mapping[str, nn.Module],
    out: str | Path,
    seed: int,
    start: str,
    name: str,
    world: World | None,
    console: Console | None,
) -> TrainedModel:
    """Train a policy on its own answers; arguments as of `ppo`.

    Args:
        model: the policy; a frozen copy is the reference.
        tokenizer: of the model.
        prompts: to answer.
        reward: a function, or a model.
        settings: of the stage.
        source: makes the source, of what all have in common.
        objective: of the source.
        trained: modules beside the policy.
        out: the stage's folder.
        seed: of the order and of the answers.
        start: what stands for the weights it begins with.
        name: of the stage.
        world: the processes.
        console: where progress is shown.
    """
    settings = resolve_optimizer(settings)
    console, world, out = console or Console(), world or current_world(), Path(out)
    function = reward if isinstance(reward, FunctionReward) else None
    frozen: dict[str, nn.Module] = {"reference": copy.deepcopy(model)}
    if not isinstance(reward, FunctionReward):
        frozen["reward"] = reward
    if world.is_first:
        own_folder(out)
    begin(model, settings.lora, seed)
    rollouts = source(
        prompts=prompts, tokenizer=tokenizer, reward=function, seed=seed, world=world, folder=out, start=start
    )
    job = TrainingJob(
        name=name,
        modules={"model": model, **trained},
        frozen=frozen,
        objective=objective(rollouts),
        source=rollouts,
        settings=settings,
        n_rows=settings.buffers * settings.steps_per_buffer * settings.batch_size,
        folder=out,
        seed=seed,
        start=start,
        row_length=rollouts.width,
        sized=sized(settings, model.config),
    )
    try:
        summary = train(job, world, console)
        summary |= rollouts.final(job.all_modules)
        summary |= {"prompts": len(prompts.train), "prompts_too_long": prompts.too_long}
    finally:
        if function is not None:
            function.close()
    finish(out, model, tokenizer, settings.lora, settings.start, world)
    forget_checkpoints(job, world)
    return TrainedModel(model, out, summary)


class PolicyMethod(AlignmentMethod):
    """A stage that learns from its own answers."""

    makes = "lm"
    figures: ClassVar[tuple[str, ...]] = ("held_out_reward", "held_out_right")
    run: ClassVar[Callable[..., TrainedModel]]
    title: ClassVar[str]
    curves: ClassVar[tuple[str, ...]] = ("reward", "kl", "held_out_reward", "held_out_right", "entropy")

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """The reward model, where a stage of the run makes it."""
        return (stage.settings.reward,) if stage.settings.reward in stage.recipe.branches else ()

    def outside(self, stage: Stage) -> dict[str, str]:
        """Prompts, a model made elsewhere, a reward's file."""
        name, found = stage.settings.reward, super().outside(stage)
        if name == VERIFY or name in stage.recipe.branches:
            return found
        return {**found, "reward": function_fingerprint(name, _where(stage))}

    def checks(self, stage: Stage) -> Iterable[Check]:
        """Model, optimizer, prompts, reward."""
        yield from super().checks(stage)
        yield from self.reward_checks(stage)

    def reward_checks(self, stage: Stage) -> Iterable[Check]:
        """The reward, and room for answers."""
        yield f"[{stage.section}] reward", lambda: self._check_reward(stage)
        yield f"[{stage.section}] max_tokens", lambda: _check_room(stage)

    def quick(self, settings: Any) -> Any:
        """A few buffers."""
        less = {"buffers": min(settings.buffers, 3), "examples": min(settings.examples, 2000)}
        return settings.model_copy(update=less | {"held_out": min(settings.held_out, 16)})

    def work(self, context: Context) -> dict[str, Any]:
        """Load all of it, and train."""
        stage, settings, seed = context.stage, context.stage.settings, context.recipe.seed
        model, tokenizer = starting_point(stage, context.run, context.console)
        model = without_dropout(model)
        room = model.config.context_length - settings.max_tokens
        prompts = load_prompts(
            settings.data, settings.examples, seed, tokenizer, room, stage.section, context.console
        )  # fmt: skip
        reward, start = starting_reward(context)
        return type(self).run(
            model, tokenizer, prompts, reward, settings, out=context.folder, seed=seed, start=start,
            name=stage.name, world=context.world, console=context.console,
        ).summary  # fmt: skip

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """What it earns on held-out prompts."""
        reward, right = summary.get("held_out_reward"), summary.get("held_out_right")
        facts = [
            ("reward on held-out prompts", format_number(reward, 3)),
            ("of them right", "" if right is None else f"{right:.1%}"),
            ("prompts", format_whole(summary.get("prompts"))),
            ("answers written", format_whole(stage.settings.buffers * stage.settings.rollouts)),
        ]
        lines = format_lines((reward, lambda value: f"reward {value:.2f}"))
        return Shown(self.title, [*facts, *training_facts(summary)], lines, self.curves)

    def _check_reward(self, stage: Stage) -> None:
        name = stage.settings.reward
        if name in stage.recipe.branches:
            if graph(stage.recipe)[name].method.makes != "scorer":
                raise DataError(f"{_where(stage)}: this stage makes no reward model.", 'Name one of method = "reward".')
        elif name != VERIFY:
            load_function(name, _where(stage))


def starting_reward(context: Context) -> tuple[FunctionReward | nn.Module, str]:
    """A stage's reward, and what stands for the weights of its model and its reward."""
    stage, settings = context.stage, context.stage.settings
    started = [model_digest(stage.outside_start or context.run.folder(settings.start) / "model")]
    if settings.reward in stage.recipe.branches:
        folder = context.run.folder(settings.reward)
        reward: FunctionReward | nn.Module = RewardModel(Scorer.load(folder))
        started += [model_digest(folder / "model"), *map(file_digest, sorted((folder / HEAD_FOLDER).iterdir()))]
    else:
        where, seconds = _where(stage), settings.reward_seconds
        reward = FunctionReward(settings.reward, where, seconds=seconds, in_process=settings.reward_process)
        started.append(VERIFY if settings.reward == VERIFY else function_fingerprint(settings.reward, where))
    return reward, value_digest(started)


def without_dropout(model: Transformer) -> Transformer:
    """The same weights in a model that draws nothing at random: the policy that writes is the one that learns."""
    if not model.config.dropout:
        return model
    plain = Transformer(reshaped(model.config.to_dict(), {"dropout": 0.0}), device="meta")
    plain.load_state_dict(model.state_dict(), assign=True)
    return plain


def _where(stage: Stage) -> str:
    return f"[{stage.section}] reward = {stage.settings.reward!r}"


def _check_room(stage: Stage) -> None:
    length = starting_config(stage)[0].context_length
    if stage.settings.max_tokens >= length - 8:
        raise DataError(
            f"[{stage.section}] max_tokens = {stage.settings.max_tokens}: a prompt has no room beside such an "
            f"answer in the model's context of {length}.",
            "Lower it.",
        )
