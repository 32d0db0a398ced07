"""Rejection-sampling fine-tuning: a model learns from its own best answers (arXiv:2308.01825; arXiv:2203.14465).

Each prompt gets some answers; those that earn at least `least` are good, and the best `keep` different ones of each
prompt become conversations, on which the model is fine-tuned as on any other (`sft.py`); a call of the calculator, its
result and the answer to that are turns of their own. What was written is kept in `answers-….jsonl`, so that a run that
goes on finds the very conversations that it began with.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import model_validator
from torch import nn

from groundup.alignment.conversations import Conversations
from groundup.alignment.method import Inputs
from groundup.alignment.on_policy import AnswerSettings, AnswersMethod, answer_flops, answer_seed, scores_of
from groundup.alignment.rewards import FunctionReward, Prompt, Prompts
from groundup.alignment.sft import SFTSettings, SupervisedFineTuning
from groundup.errors import DataError
from groundup.files import own_folder, value_digest, write_text
from groundup.generation import Engine, SamplingParams
from groundup.generation.calculator import tool_turn
from groundup.generation.rollouts import roll_out, use_calculator
from groundup.recipe import setting
from groundup.tokenizer import Message
from groundup.training import TrainedModel, choose_precision

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


class RejectionMethod(AnswersMethod, SupervisedFineTuning):
    """The stage: fine-tuning on a model's own best answers."""

    name = "rejection"
    settings = RejectionSettings
    version = 3
    figures: ClassVar[tuple[str, ...]] = ("val_loss", "final_loss", "prompts_solved")  # type: ignore[assignment]
    title = "Rejection-sampling fine-tuning"
    facts = (
        ("answers written", "{answers:,}"),
        ("of them good", "{answers_good:,}"),
        ("of them without a reward", "{answers_failed:,}"),
        ("prompts solved", "{prompts_solved:,}"),
        *SupervisedFineTuning.facts,
    )

    def run(
        self, inputs: Inputs, *, prompts: Prompts | None = None, reward: FunctionReward | nn.Module | None = None,
        **options: Any,
    ) -> TrainedModel:  # fmt: skip
        """Sample, select, fine-tune; go on from what is in the stage's folder.

        Raises:
            DataError: too few good answers to learn from, or the reward function fails for all of them.
        """
        settings, world, tokenizer, out = inputs.settings, inputs.world, inputs.tokenizer, inputs.out
        prompts, reward = self.prompts_and_reward(inputs, prompts, reward)
        key = [inputs.start, inputs.seed, tokenizer.fingerprint, settings.fingerprint_values()]
        path = out / f"answers-{value_digest(key)[:16]}.jsonl"
        if not world.any(path.is_file()):
            sides = [
                _good_answers(inputs, side, reward, f"{inputs.name}: {what}")
                for side, what in ((prompts.train, "answers"), (prompts.held_out, "held-out answers"))
            ]
            if world.is_first:
                own_folder(out)
                write_text(path, "".join(json.dumps(side, ensure_ascii=False) + "\n" for side in sides))
            world.wait()
        train, held_out = map(json.loads, path.read_bytes().splitlines())
        if min(len(train["messages"]), len(held_out["messages"])) == 0:
            raise DataError(
                f"{inputs.name}: of {train['written']:,} answers {len(train['messages'])} are good, and of "
                f"{held_out['written']:,} to held-out prompts {len(held_out['messages'])}: nothing to learn from.",
                f"Lower least = {settings.least:g}, or start from a model that is right now and then.",
            )
        learned = Conversations(train["messages"], held_out["messages"], {})
        done = super().run(inputs, conversations=learned, **options)
        done.summary["flops"] += train["flops"]  # of the answers; those to held-out prompts are not learned from
        names = {"answers": "written", "answers_good": "good", "answers_failed": "failed", "prompts_solved": "solved"}
        done.summary.update({figure: train[name] for figure, name in names.items()})
        return done

    def quick(self, settings: Any) -> Any:
        """Few prompts."""
        less = {"prompts": min(settings.prompts, 64), "samples": 2, "keep": 1}
        return super().quick(settings).model_copy(update=less)


def _good_answers(
    inputs: Inputs, prompts: Sequence[Prompt], reward: FunctionReward | nn.Module, what: str
) -> dict[str, Any]:
    """Conversations with the best answers, the same in one process and in many, which each write a share."""
    settings, world, tokenizer = inputs.settings, inputs.world, inputs.tokenizer
    prompts = prompts[: settings.prompts]
    todo = [(number, sample) for number in range(len(prompts)) for sample in range(settings.samples)]
    dtype, _ = choose_precision(settings.precision, world.device.type)
    width = max(len(prompt.ids) for prompt in prompts) + settings.max_tokens
    params = SamplingParams(temperature=settings.temperature, max_tokens=settings.max_tokens)
    engine = Engine(inputs.model.to(world.device), tokenizer, slots=64, dtype=dtype)
    good: dict[int, list[tuple[float, tuple[str, ...]]]] = defaultdict(list)  # rewards and texts, by prompts' numbers
    tool, n_failed, flops = use_calculator(tokenizer), 0, 0.0
    with inputs.console.bar(what, len(todo)) as bar:
        for first in range(0, len(todo), _AT_ONCE * world.size):
            chunk = todo[first : first + _AT_ONCE * world.size]
            n_real = len(chunk)
            chunk += [chunk[-1]] * (-n_real % world.size)  # as many for every process
            rows = world.rows(len(chunk))
            own = chunk[rows]
            asked = [prompts[number] for number, _ in own]
            seeds = [answer_seed(inputs.seed, what, number, sample) for number, sample in own]
            rolled = roll_out(engine, [prompt.ids for prompt in asked], params, seeds, width=width, use_tool=tool)
            lengths = rolled.lengths[: max(0, n_real - rows.start)].tolist()
            spent = answer_flops(lengths, inputs.model.config, 1, reward)
            flops += float(world.sum(torch.tensor([spent], dtype=torch.float64))[0])
            answers = rolled.ids.where(rolled.is_answer & rolled.is_ended[:, None], -1)  # none of those without an end
            gathered = (world.gather(part).tolist() for part in (scores_of(reward, asked, rolled), answers))
            for (number, _), value, ids in zip(dict.fromkeys(chunk), *gathered, strict=False):
                # An answer and its end; or a call, what the calculator says (−1), and the answer to that.
                parts = itertools.groupby(ids, key=lambda token: token >= 0)
                n_failed += math.isnan(value)
                texts = tuple(tokenizer.decode([*part][:-1]) for is_written, part in parts if is_written)
                if texts and value >= settings.least:  # NaN is not
                    good[number].append((value, texts))
            bar.update(min(len(todo), first + len(chunk)))
        if n_failed == len(todo) and isinstance(reward, FunctionReward):
            raise reward.all_failed()
        n_good = sum(map(len, good.values()))
        bar.finish(f"{n_good:,} of {len(todo):,} answers are good, to {len(good):,} of {len(prompts):,} prompts")
    messages = []
    for number, answers_of in sorted(good.items()):
        best = dict.fromkeys(texts for _, texts in sorted(answers_of, key=lambda one: -one[0]))
        messages += [[*prompts[number].messages, *_turns(texts)] for texts in [*best][: settings.keep]]
    told = {"written": len(todo), "good": n_good, "failed": n_failed, "solved": len(good), "flops": flops}
    return {"messages": messages, **told}


def _turns(texts: Sequence[str]) -> list[Message]:
    """An answer as a turn; or a call of the calculator, its result, and the answer to that."""
    turns: list[Message] = [{"role": "assistant", "content": text} for text in texts]
    if len(turns) > 1 and (result := tool_turn(texts[0])) is not None:
        turns.insert(1, result)
    return turns


REJECTION = RejectionMethod()
rejection_sampling = REJECTION.train
