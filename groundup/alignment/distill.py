"""Distillation: a small model learns to predict what a larger one would, and so can guess for it, or stand for it.

The student minimizes KL(p ‖ q) of the teacher's distribution p and its own q at every position (arXiv:1503.02531, at
temperature 1), of rows of the run's text and of text that the teacher wrote itself, which is what the student will
have to continue as a draft (arXiv:2310.08461: what the draft is trained on decides how many guesses are kept):

    loss = mean over positions of Σ_x p(x) (ln p(x) − ln q(x))

Or, `level = "sequence"`, it is fine-tuned on answers that the teacher writes to `prompts` (arXiv:1606.07947, section
3.2): −Σ ln q(answer), the teacher's distribution replaced by a sample of it. That makes a smaller assistant.

A guess is kept with probability Σ_x min(p(x), q(x)) (arXiv:2211.17192, theorem 3.5), which is reported on held-out text
as `acceptance`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundup.alignment.conversations import Conversations
from groundup.alignment.method import AlignmentMethod, Inputs
from groundup.alignment.rewards import Prompts, load_prompts
from groundup.alignment.sft import SFTSettings, fine_tune
from groundup.errors import DataError
from groundup.files import atomic_folder, own_folder, value_digest, write_tensors, write_text
from groundup.generation import Engine, Request, SamplingParams
from groundup.generation.calculator import tool_turn
from groundup.generation.rollouts import use_calculator
from groundup.interop.start import check_shards, starting_config, starting_point
from groundup.model import ModelConfig, OutputLayer, Transformer
from groundup.recipe import AlignSettings, ModelSettings, OptimizerSettings, Section, Texts, setting
from groundup.shards import TokenShards
from groundup.shards.mixture import Shares, integer_weights
from groundup.stage import Check, Context, Stage, model_digest
from groundup.tokenizer import Message
from groundup.training import IGNORED, Batch, ShardBatches, Term, TrainedModel, TrainingJob, choose_precision
from groundup.training.objective import pass_flops
from groundup.training.pretrain import QUICK_VALIDATION

_SLICE_LOGITS = 1 << 22
"""Logits of each model that are held at once: 16 MiB."""
_TEXTS_AT_ONCE = 64
"""Texts that each process writes before all put theirs together."""
_ACCEPTANCE_TOKENS = 20_000
"""Held-out tokens over which guesses are compared."""


class DistillSettings(AlignSettings, OptimizerSettings):
    """A model to a smaller one that guesses its tokens."""

    lora: ClassVar[None] = None  # all of it is trained

    level: Literal["token", "sequence"] = setting(
        "token", "what is learned: the larger model's distribution of every token, or its answers to prompts"
    )
    model: ModelSettings = Field(
        default_factory=lambda: ModelSettings(preset="ground-nano"),
        description="the smaller model, as [model] describes one; its vocabulary is the larger one's",
    )
    tokens: int = setting(2_000_000, "tokens to train on", ge=1)
    own_share: float = setting(0.5, "share of the rows that the larger model wrote itself", ge=0.0, le=1.0)
    own_tokens: int = setting(200_000, "tokens that the larger model writes for it", ge=0)
    prompts: Texts = setting(
        (),
        "conversations whose questions the larger model answers, instead of writing texts: files, or groundup:tasks",
    )
    temperature: float = setting(1.0, "at which it writes", ge=0.0, le=100.0)

    @model_validator(mode="after")
    def _answers_need_questions(self) -> DistillSettings:
        if self.level == "sequence" and not (self.prompts and self.own_share and self.own_tokens):
            raise ValueError('level = "sequence": name prompts to answer, and leave own_share and own_tokens above 0')
        if self.level == "token" and (self.label_smoothing or self.z_loss):
            raise ValueError('label_smoothing and z_loss are of answers, level = "sequence": leave them unset')
        return self


@dataclass(frozen=True)
class Distillation:
    """KL(teacher ‖ student) at every position that has a target, in nats."""

    teacher: ModelConfig  # for the FLOPs of its passes

    def counts(self, batch: Batch) -> dict[str, float]:
        """Positions that have a target."""
        return {"loss": int((batch["targets"] != IGNORED).sum())}

    def terms(self, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, Term]:
        """One pass of each model; no more logits than a slice's are held."""
        mask = (batch["targets"] != IGNORED).flatten()
        with torch.no_grad():
            theirs, output = modules["teacher"](batch["ids"], head=lambda hidden, output: (hidden, output))
        student = modules["model"]
        loss = student(batch["ids"], head=lambda hidden, own: _divergence_sum(hidden, own, theirs, output, mask))
        balance = student.balance_loss()  # type: ignore[operator]
        return {"loss": Term(loss if balance is None else loss + balance, loss.detach())}

    def flops(self, config: ModelConfig, lengths: Sequence[int]) -> float:
        """The student's forward and backward pass, and the teacher's forward pass."""
        return pass_flops(config, lengths) + pass_flops(self.teacher, lengths) / 3


def _divergence_sum(
    hidden: Float[Tensor, "batch seq d_model"], own: OutputLayer,
    theirs: Float[Tensor, "batch seq d_teacher"], output: OutputLayer, mask: Tensor,
) -> Float[Tensor, ""]:  # fmt: skip
    """Σ over masked positions of KL(teacher ‖ student), slice by slice; each slice is computed again backwards."""

    def of_slice(hidden: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
        q, p = own.logits(hidden).log_softmax(dim=-1), output.logits(theirs).log_softmax(dim=-1)
        return (p.exp() * (p - q)).sum(dim=-1)[mask].sum()

    n_rows = max(1, _SLICE_LOGITS // own.vocab_size)
    parts = (torch.split(part.flatten(0, -2), n_rows) for part in (hidden, theirs))
    slices = zip(*parts, torch.split(mask, n_rows), strict=True)
    return torch.stack([checkpoint(of_slice, *part, use_reentrant=False) for part in slices]).sum()


class DistillRows:
    """Rows of text, and of what the teacher wrote; each a pure function of (seed, place).

    Args:
        text: rows of the run's shards; its validation is this source's.
        own: (n, length + 1) int64: what the teacher wrote.
        share: of the rows that are taken from it.
        seed: of the order.
    """

    def __init__(self, text: ShardBatches, own: np.ndarray, share: float, seed: int) -> None:
        self._text, self.own = text, own
        self._shares = Shares(integer_weights([1 - share, share]), seed) if 0 < share < 1 else None
        self._is_own = share == 1
        self.fingerprint = value_digest([text.fingerprint, own.tolist(), share, seed])

    def rows(self, first: int, last: int) -> Batch:
        """Rows `first` … `last` − 1 of the endless order."""
        places = np.arange(first, last)
        component, number = self._shares(places) if self._shares else (np.full_like(places, self._is_own), places)
        batch = self._text.rows(first, last)
        for place in np.flatnonzero(component):
            row = torch.from_numpy(self.own[number[place] % len(self.own)])
            width = batch["ids"].shape[1]
            batch["ids"][place], batch["targets"][place] = row[:width], row[1 : width + 1]
        return batch

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Batch]:
        """Of the run's text."""
        return self._text.validation(batch_size, limit_tokens)


@torch.inference_mode()
def acceptance(teacher: nn.Module, student: Transformer, source: DistillRows | ShardBatches) -> float:
    """The mean over held-out positions of Σ_x min(p(x), q(x)): the share of guesses that are kept."""
    kept, n = 0.0, 0
    teacher.eval(), student.eval()
    device = next(student.parameters()).device
    for batch in source.validation(1, _ACCEPTANCE_TOKENS):
        ids, mask = batch["ids"].to(device), (batch["targets"] != IGNORED).to(device)
        p, q = (model(ids).softmax(dim=-1) for model in (teacher, student))
        kept += float(torch.minimum(p, q).sum(dim=-1)[mask].sum())
        n += int(mask.sum())
    return kept / max(1, n)


class DistillMethod(AlignmentMethod):
    """The stage: a draft of a model."""

    name = "distill"
    settings = DistillSettings
    version = 2
    makes = "lm"
    is_default = False
    teaches = False
    is_chat = False
    reads = "prompts"
    figures = ("val_loss", "final_loss", "acceptance")
    title = "Distillation"
    facts = (("guesses kept", "{acceptance:.1%}"), ("rows of the model's own text", "{own_rows:,}"))
    lines = ("{acceptance:.0%} of guesses kept", "loss {initial_loss:.2f} → {final_loss:.2f}")

    def run(  # type: ignore[override]
        self, inputs: Inputs, *, teacher: Transformer, shards: str | Path, verify: bool = True
    ) -> TrainedModel:
        """Train a student on a teacher's distributions, or fine-tune it on its answers.

        Args:
            inputs: of the stage; the model is the student, of a context as long as the teacher's or shorter. `start`
                stands for the teacher's weights.
            teacher: put into evaluation mode, and into the precision of the settings.
            shards: a folder written by `write_shards` with the tokenizer of both.
            verify: compare the digests of the shards; else only sizes.

        Raises:
            ArtifactError: shards missing, damaged or of another tokenizer.
            DataError: the models do not fit together, or nothing to learn from was written.
        """
        student, settings, world = inputs.model, inputs.settings, inputs.world
        sizes = [model.config.vocab_size for model in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise DataError(
                f"{inputs.name}: the smaller model has {sizes[0]} tokens, the larger one {sizes[1]}.",
                "Leave the vocabulary out: it is the larger model's.",
            )
        length = min(teacher.config.context_length, student.config.context_length)
        verify, expected = verify and world.is_first, inputs.tokenizer.fingerprint
        train, held_out = (
            TokenShards.open(shards, split, tokenizer_fingerprint=expected, verify=verify)
            for split in ("train", "validation")
        )
        text = ShardBatches(train, held_out, length, settings.batch_size, inputs.seed)
        n_own = settings.own_tokens if settings.own_share else 0
        key = [inputs.start, expected, n_own, length, settings.temperature, list(settings.prompts), inputs.seed]
        kept = inputs.out / f"own-text-{value_digest(key)[:16]}"
        if settings.level == "token":
            own = _own_rows(inputs, teacher, length, n_own, kept)
            return super().run(inputs, teacher=teacher, text=text, own=own)
        answers, n_flops = _own_answers(inputs, teacher, length, kept.with_suffix(".jsonl"))
        shared = {name: getattr(settings, name) for name in OptimizerSettings.model_fields}
        tuned = fine_tune(
            student, inputs.tokenizer, SFTSettings(start=settings.start, replay=1 - settings.own_share, **shared),
            out=inputs.out, conversations=answers, replay_shards=shards, seed=inputs.seed, name=inputs.name,
            flops=-(-settings.tokens // length) * pass_flops(student.config, [length]), verify=verify, world=world,
            console=inputs.console,
        )  # fmt: skip
        kept_share = acceptance(teacher.to(world.device), student, text)
        tuned.summary["flops"] += n_flops
        tuned.summary.update(acceptance=kept_share, own_rows=len(answers.train))
        return tuned

    def job(  # type: ignore[override]
        self, inputs: Inputs, *, teacher: Transformer, text: ShardBatches, own: np.ndarray
    ) -> TrainingJob:
        """The divergence, on rows of text and of what the teacher wrote."""
        settings, length = inputs.settings, own.shape[1] - 1
        source = DistillRows(text, own, settings.own_share if len(own) else 0.0, inputs.seed)
        return inputs.job(
            Distillation(teacher.config), source, settings.tokens / length, row_length=length,
            frozen={"teacher": teacher.eval().requires_grad_(False)},
        )  # fmt: skip

    def measure(self, inputs: Inputs, job: TrainingJob, summary: dict[str, Any]) -> dict[str, Any]:
        """How often guesses are kept; the FLOPs of the teacher's own rows."""
        source: Any = job.source
        teacher: Any = job.frozen["teacher"]
        flops = summary["flops"] + pass_flops(teacher.config, [source.own.shape[1]] * len(source.own)) / 3
        kept_share = acceptance(teacher, job.model, source)
        return {"acceptance": kept_share, "own_rows": len(source.own), "flops": flops}

    def trained_config(self, stage: Stage) -> ModelConfig:
        """The student's; its vocabulary is the teacher's, and unless it says otherwise its context."""
        shape, (teacher, _) = stage.settings.model, starting_config(stage)
        length = shape.context_length or teacher.context_length
        config: ModelConfig = shape.model_copy(update={"context_length": length}).config(teacher.vocab_size)
        return config

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """The text."""
        return ("shards",)

    def sections(self, stage: Stage) -> tuple[Section, ...]:
        """Its own, the student in it."""
        return (stage.settings,)

    def checks(self, stage: Stage) -> Iterable[Check]:
        """Models, optimizer, prompts, text."""
        yield from super().checks(stage)
        yield f"[{stage.section}] model", lambda: self.trained_config(stage)
        yield f"[{stage.section}]", lambda: check_shards(stage, "start")

    def quick(self, settings: DistillSettings) -> DistillSettings:
        """A few steps, and little of the teacher's own text."""
        less = {"tokens": min(settings.tokens, 40_000), "own_tokens": min(settings.own_tokens, 4_000)}
        return settings.model_copy(update=less | QUICK_VALIDATION)

    def work(self, context: Context) -> dict[str, Any]:
        """See `run`."""
        stage, recipe, run = context.stage, context.recipe, context.run
        teacher, tokenizer = starting_point(stage, run, context.console)
        student = Transformer(self.trained_config(stage), seed=recipe.seed)
        start = model_digest(stage.outside_start or run.folder(stage.settings.start) / "model")
        return self.train(
            student, tokenizer, stage.settings, out=context.folder, seed=recipe.seed, name=stage.name, start=start,
            world=context.world, console=context.console, teacher=teacher, shards=run.folder("shards"),
            verify=recipe.verify,
        ).summary  # fmt: skip


def _own_rows(inputs: Inputs, teacher: Transformer, length: int, n_tokens: int, kept: Path) -> np.ndarray:
    """Rows of what the teacher writes, (n, length + 1); a run that goes on finds the very rows it began with."""
    if n_tokens <= length:
        return np.empty((0, length + 1), np.int64)
    if not inputs.world.any(kept.is_dir()):
        prompts = [[inputs.tokenizer.end_of_text_id]]
        if inputs.settings.prompts:
            prompts = [prompt.ids for prompt in _prompts(inputs, length).train]
        texts = _texts(inputs, teacher, length, itertools.cycle(prompts), "own text")
        stream = [*itertools.chain.from_iterable(text for text, _ in texts)][: n_tokens // (length + 1) * (length + 1)]
        if inputs.world.is_first:
            own_folder(inputs.out)
            with atomic_folder(kept) as folder:
                write_tensors(folder / "rows.safetensors", {"rows": torch.tensor(stream).view(-1, length + 1)})
        inputs.world.wait()
    return load_file(kept / "rows.safetensors")["rows"].numpy()


def _own_answers(inputs: Inputs, teacher: Transformer, length: int, kept: Path) -> tuple[Conversations, float]:
    """Conversations whose last answers are the teacher's, and the FLOPs of those to learn from.

    A run that goes on finds the very same.

    Those without an end are left out. A call of the calculator is followed by its result and, in a second round, which
    may write as much again, by the answer to that.

    Raises:
        DataError: no answer came to its end.
    """
    sides: list[list[list[Message]]] = []
    flops: list[float] = []
    use_tool = use_calculator(inputs.tokenizer)
    found = None if inputs.world.any(kept.is_file()) else _prompts(inputs, length)
    for side in (found.train, found.held_out) if found is not None else ():
        asked, said = [(prompt.messages, prompt.ids) for prompt in side], list[list[Message]]()
        lengths: list[int] = []
        for may_call in (True, False):
            texts = _texts(inputs, teacher, length, (ids for _, ids in asked), "answers")
            called = []
            for (talk, ids), (text, is_ended) in zip(asked, texts, strict=False):
                lengths.append(len(text))
                answer = inputs.tokenizer.decode(text[len(ids) :])
                turns: list[Message] = [*talk, {"role": "assistant", "content": answer}]
                tool, result = tool_turn(answer), use_tool(answer) if is_ended else None
                if is_ended and result is None:
                    said.append(turns)
                elif result is not None and tool is not None and may_call and len(text) + len(result) < length:
                    called.append(([*turns, tool], [*text, *result]))
            asked = called
        if not said:
            raise DataError(
                f"[{inputs.section}] prompts: no answer came to its end within the context of {length} tokens.",
                "Start from a model that has learned to answer.",
            )
        sides.append(said)
        flops.append(pass_flops(teacher.config, lengths) / 3)
    if sides and inputs.world.is_first:
        own_folder(inputs.out)
        write_text(kept, "".join(json.dumps(side, ensure_ascii=False) + "\n" for side in (*sides, flops)))
    inputs.world.wait()
    train, held_out, (n_flops, _) = map(json.loads, kept.read_bytes().splitlines())
    return Conversations(train, held_out, {}), n_flops


def _prompts(inputs: Inputs, length: int) -> Prompts:
    """What the teacher answers; what leaves it less than half of the context is left out."""
    named, seed, section = inputs.settings.prompts, inputs.seed, inputs.section
    return load_prompts(named, 10_000, seed, inputs.tokenizer, length // 2, section, inputs.console)


def _texts(
    inputs: Inputs, teacher: Transformer, length: int, prompts: Iterable[list[int]], what: str
) -> Iterator[tuple[list[int], bool]]:
    """What the teacher writes behind each prompt, with the token that ended it, and whether one did.

    It stops after `own_tokens`, of which a question to be answered is none. The same in one process and in many, which
    each write a share.
    """
    settings, world = inputs.settings, inputs.world
    dtype, _ = choose_precision(settings.precision, world.device.type)
    dtype = dtype if dtype == torch.bfloat16 else torch.float32
    engine = Engine(teacher.to(world.device), inputs.tokenizer, slots=32, dtype=dtype)
    waiting, place, n_tokens = iter(prompts), inputs.seed, 0
    with inputs.console.bar(f"{inputs.name}: {what}", settings.own_tokens) as bar:
        while chunk := list(itertools.islice(waiting, world.size * _TEXTS_AT_ONCE)):
            chunk += [chunk[-1]] * (-len(chunk) % world.size)
            requests = []
            for number, ids in list(enumerate(chunk, start=place))[world.rows(len(chunk))]:
                params = SamplingParams(temperature=settings.temperature, max_tokens=length - len(ids) + 1)
                requests.append(Request(ids, params, seed=number))
            place += len(chunk)
            texts = torch.full((len(requests), length + 3), -1)
            for row, request, (text,) in zip(texts, requests, engine.run(requests), strict=True):
                ids = [*request.ids, *text.ids, *([] if text.end_id is None else [text.end_id])]
                row[: len(ids)], row[-1] = torch.tensor(ids), text.end_id is not None
            for ids, row in zip(chunk, world.gather(texts).tolist(), strict=True):
                found = [token for token in row[:-1] if token >= 0]
                n_tokens += len(found) - (len(ids) if settings.level == "sequence" else 0)
                bar.update(min(n_tokens, settings.own_tokens))
                yield found, row[-1] == 1
                if n_tokens >= settings.own_tokens:
                    return


DISTILL = DistillMethod()
distill = DISTILL.train
