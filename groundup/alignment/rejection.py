"""Rejection-sampling fine-tuning: a model learns from its own best answers (arXiv:2308.01825; arXiv:2203.14465).

Each prompt gets some answers; those that earn at least `least` are good, and the best `keep` different ones of each
prompt become conversations, on which the model is fine-tuned as on any other (`sft.py`). What was written is kept in
`answers-….jsonl`, so that a run that goes on finds the very conversations that it began with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import xxhash
from pydantic import model_validator
from torch import nn

from groundup.alignment.conversations import Conversations
from groundup.alignment.on_policy import AnswerSettings, PolicyMethod, scores_of, starting_reward, without_dropout
from groundup.alignment.rewards import FunctionReward, Prompt, Prompts, load_prompts
from groundup.alignment.sft import SFT, SFTSettings, fine_tune
from groundup.console import Console
from groundup.distributed import World, current_world
from groundup.errors import DataError
from groundup.files import own_folder, value_digest, write_text
from groundup.generation import Engine, SamplingParams
from groundup.generation.rollouts import roll_out
from groundup.interop.start import starting_point
from groundup.model import Transformer
from groundup.recipe import setting
from groundup.report.format import format_whole
from groundup.stage import Check, Context, Shown, Stage
from groundup.tokenizer import Tokenizer
from groundup.training import TrainedModel
from groundup.training.precision import choose_precision

_AT_ONCE = 256


class RejectionSettings(SFTSettings, AnswerSettings):
    """A model and a reward to a model that has learned from its best answers."""

    prompts: int = setting(1000, "prompts that are answered", ge=2)
    samples: int = setting(8, "answers to each", ge=1, le=1024)
    keep: int = setting(1, "best different answers of a prompt that are learned", ge=1)
    least: float = setting(1.0, "reward from which an answer is good")

    @model_validator(mode="after")
    def _some_are_left_out(self) -> RejectionSettings:
        if self.keep > self.samples:
            raise ValueError(f"keep {self.keep} of {self.samples} samples: lower it")
        return self


def rejection_sampling(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Prompts,
    reward: FunctionReward | nn.Module,
    settings: RejectionSettings | None = None,
    *,
    out: str | Path,
    seed: int = 1,
    start: str = "fresh",
    name: str = "rejection",
    world: World | None = None,
    console: Console | None = None,
    **options: Any,
) -> TrainedModel:
    """Sample, select, fine-tune; go on from what is in `out`.

    Args:
        model: trained in place.
        tokenizer: of the model.
        prompts: to answer.
        reward: a function or a reward model, as of `ppo`.
        settings: what `[align.NAME]` with `method = "rejection"` says.
        out: the stage's folder.
        seed: of the answers and of the order.
        start: what stands for the weights of model and reward.
        name: of the stage, in messages.
        world: the processes.
        console: where progress is shown.
        options: of `fine_tune`.

    Raises:
        DataError: too few good answers to learn from.
        Interrupted: asked to stop; everything is saved.
    """
    settings = settings or RejectionSettings()
    console, world, out = console or Console(), world or current_world(), Path(out)
    key = [start, seed, tokenizer.fingerprint, settings.fingerprint_values()]
    path = out / f"answers-{value_digest(key)[:16]}.jsonl"
    if not world.any(path.is_file()):
        sides = [
            _good_answers(model, tokenizer, side, reward, settings, seed, f"{name}: {what}", world, console)
            for side, what in ((prompts.train, "answers"), (prompts.held_out, "held-out answers"))
        ]
        if world.is_first:
            own_folder(out)
            write_text(path, "".join(json.dumps(side, ensure_ascii=False) + "\n" for side in sides))
        world.wait()
    train, held_out = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    if min(len(train["messages"]), len(held_out["messages"])) == 0:
        raise DataError(
            f"{name}: of {train['written']:,} answers {len(train['messages'])} are good, and of "
            f"{held_out['written']:,} to held-out prompts {len(held_out['messages'])}: nothing to learn from.",
            f"Lower least = {settings.least:g}, or start from a model that is right now and then.",
        )
    conversations = Conversations(train["messages"], held_out["messages"], {})
    done = fine_tune(
        model, tokenizer, settings, out=out, conversations=conversations, seed=seed, name=name, world=world,
        console=console, **options,
    )  # fmt: skip
    done.summary.update(answers=train["written"], answers_good=train["good"], prompts_solved=train["solved"])
    return done


def _good_answers(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], reward: FunctionReward | nn.Module,
    settings: RejectionSettings, seed: int, name: str, world: World, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Conversations with the best answers, the same in one process and in many, which each write a share."""
    prompts = prompts[: settings.prompts]
    todo = [(number, sample) for number in range(len(prompts)) for sample in range(settings.samples)]
    dtype, _ = choose_precision(settings.precision, world.device.type)
    width = max(len(prompt.ids) for prompt in prompts) + settings.max_tokens
    params = SamplingParams(temperature=settings.temperature, max_tokens=settings.max_tokens)
    model = model.to(world.device)
    engine = Engine(model, tokenizer, slots=64, dtype=dtype)
    found: dict[int, list[tuple[float, str]]] = {}
    good = 0
    with console.bar(name, len(todo)) as bar:
        for first in range(0, len(todo), _AT_ONCE * world.size):
            chunk = todo[first : first + _AT_ONCE * world.size]
            chunk += [chunk[-1]] * (-len(chunk) % world.size)  # as many for every process
            own = chunk[world.rows(len(chunk))]
            asked = [prompts[number] for number, _ in own]
            seeds = [
                xxhash.xxh3_64_intdigest(f"{seed}/{name}/{number}/{sample}".encode()) >> 1 for number, sample in own
            ]
            rolled = roll_out(engine, [prompt.ids for prompt in asked], params, seeds, width=width)
            rewards = world.gather(scores_of(reward, asked, rolled)).tolist()
            answers = world.gather(rolled.ids.where(rolled.is_answer, -1)).tolist()
            ended = world.gather(rolled.is_ended.int()).tolist()
            for (number, _), value, ids, has_end in zip(dict.fromkeys(chunk), rewards, answers, ended, strict=False):
                if has_end and not math.isnan(value) and value >= settings.least:
                    text = tokenizer.decode([token for token in ids if token >= 0][:-1])
                    found.setdefault(number, []).append((value, text))
                    good += 1
            bar.update(min(len(todo), first + len(chunk)))
        bar.finish(f"{good:,} of {len(todo):,} answers are good, to {len(found):,} of {len(prompts):,} prompts")
    messages = []
    for number, answers_of in sorted(found.items()):
        best = dict.fromkeys(text for _, text in sorted(answers_of, key=lambda one: -one[0]))
        chosen = list(best)[: settings.keep]
        messages += [[*prompts[number].messages, {"role": "assistant", "content": text}] for text in chosen]
    return {"messages": messages, "written": len(todo), "good": good, "solved": len(found)}


class RejectionMethod(PolicyMethod):
    """The stage: fine-tuning on a model's own best answers."""

    settings = RejectionSettings
    figures: ClassVar[tuple[str, ...]] = ("val_loss", "final_loss", "prompts_solved")

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """The reward model, and text to replay."""
        return (*super().needs(stage), *SFT.needs(stage))

    def checks(self, stage: Stage) -> Iterable[Check]:
        """As of both."""
        yield from SFT.checks(stage)
        yield from self.reward_checks(stage)

    def derived(self, stage: Stage) -> Iterable[tuple[str, str, str]]:
        """As of fine-tuning."""
        return SFT.derived(stage)

    def quick(self, settings: Any) -> Any:
        """Few prompts."""
        return SFT.quick(settings).model_copy(update={"prompts": min(settings.prompts, 64), "samples": 2, "keep": 1})

    def work(self, context: Context) -> dict[str, Any]:
        """See `rejection_sampling`."""
        stage, settings, seed = context.stage, context.stage.settings, context.recipe.seed
        model, tokenizer = starting_point(stage, context.run, context.console)
        room = model.config.context_length - settings.max_tokens
        prompts = load_prompts(
            settings.data, settings.examples, seed, tokenizer, room, stage.section, context.console
        )  # fmt: skip
        reward, start = starting_reward(context)
        shards = context.run.folder("shards") if "shards" in stage.needs else None
        return rejection_sampling(
            without_dropout(model), tokenizer, prompts, reward, settings, out=context.folder, seed=seed, start=start,
            name=stage.name, world=context.world, console=context.console, replay_shards=shards,
            flops=context.compute(), verify=context.recipe.verify,
        ).summary  # fmt: skip

    def shown(self, stage: Stage, summary: dict[str, Any]) -> Shown:  # type: ignore[override]
        """Answers, and the fine-tuning on them."""
        tuned = SFT.shown(stage, summary)
        counts = [(what, format_whole(summary.get(name))) for what, name in (
            ("answers written", "answers"), ("of them good", "answers_good"), ("prompts solved", "prompts_solved"),
        )]  # fmt: skip
        return Shown("Rejection-sampling fine-tuning", [*counts, *tuned.facts], tuned.lines)


REJECTION = RejectionMethod()
