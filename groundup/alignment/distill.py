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

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundup.alignment.conversations import Conversations, data_fingerprint, load_conversations
from groundup.alignment.sft import SFTSettings, fine_tune
from groundup.console import Console
from groundup.distributed import World, current_world
from groundup.errors import DataError
from groundup.evaluation.during import scores_during
from groundup.files import atomic_folder, own_folder, value_digest, write_tensors, write_text
from groundup.generation import Engine, Request, SamplingParams
from groundup.interop import save_model
from groundup.interop.start import check_start, starting_config, starting_point, starting_tokenizer
from groundup.model import ModelConfig, OutputLayer, Transformer
from groundup.model.cost import forward_flops
from groundup.recipe import AlignSettings, ModelSettings, OptimizerSettings, Section, Texts, resolve_optimizer, setting
from groundup.report.format import format_lines, format_whole, loss_line, training_facts
from groundup.shards import TokenShards
from groundup.shards.mixture import Shares, integer_weights
from groundup.stage import Check, Context, Method, Shown, Stage, model_digest
from groundup.tokenizer import Message, Tokenizer, render
from groundup.training import IGNORED, Batch, TrainedModel, TrainingJob, forget_checkpoints, train
from groundup.training.batches import ShardBatches
from groundup.training.objective import Term, pass_flops
from groundup.training.planning.memory import Workload, device_memory
from groundup.training.precision import choose_precision
from groundup.training.pretrain import QUICK_VALIDATION

_SLICE_LOGITS = 1 << 22
"""Logits of each model that are held at once: 16 MiB."""
_TEXTS_AT_ONCE = 64
"""Texts that each process writes before all put theirs together."""
_ACCEPTANCE_TOKENS = 20_000
"""Held-out tokens over which guesses are compared."""


class DistillSettings(AlignSettings, OptimizerSettings):
    """A model to a smaller one that guesses its tokens."""

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
        return self


def distill(
    teacher: Transformer,
    student: Transformer,
    tokenizer: Tokenizer,
    shards: str | Path,
    settings: DistillSettings | None = None,
    *,
    out: str | Path,
    seed: int = 1,
    start: str = "fresh",
    name: str = "distill",
    verify: bool = True,
    world: World | None = None,
    console: Console | None = None,
) -> TrainedModel:
    """Train a student on a teacher's distributions or answers; go on from a checkpoint in `out` if there is one.

    Args:
        teacher: put into evaluation mode, and into the precision of the settings.
        student: trained in place; of the same vocabulary, and of a context as long or shorter.
        tokenizer: of both.
        shards: a folder written by `write_shards` with this tokenizer.
        settings: what `[align.NAME]` with `method = "distill"` says; its `start` and `model` load nothing.
        out: the folder for logs, checkpoints, what the teacher wrote, and the model.
        start: what stands for the teacher's weights.
        seed, name, verify, world, console: as for `fine_tune`.

    Raises:
        ArtifactError: shards missing, damaged or of another tokenizer.
        DataError: the models do not fit together, or nothing to learn from was written.
        Interrupted: asked to stop; everything is saved.
    """
    settings = resolve_optimizer(settings or DistillSettings())
    console, world, out = console or Console(), world or current_world(), Path(out)
    if student.config.vocab_size != teacher.config.vocab_size:
        raise DataError(
            f"{name}: the smaller model has {student.config.vocab_size} tokens, the larger one "
            f"{teacher.config.vocab_size}.",
            "Leave the vocabulary out: it is the larger model's.",
        )
    length = min(teacher.config.context_length, student.config.context_length)
    verify = verify and world.is_first
    splits = [
        TokenShards.open(shards, split, tokenizer_fingerprint=tokenizer.fingerprint, verify=verify)
        for split in ("train", "validation")
    ]
    text = ShardBatches(splits[0], splits[1], length, settings.batch_size, seed)
    n_own = settings.own_tokens if settings.own_share else 0
    key = [start, tokenizer.fingerprint, n_own, length, settings.temperature, list(settings.prompts), seed]
    path = out / f"own-text-{value_digest(key)[:16]}"
    texts = functools.partial(_texts, teacher, tokenizer, settings, length, seed, world)
    sides = _questions(tokenizer, settings, seed, name, console) if settings.prompts else []
    if settings.level == "sequence":
        path = path.with_suffix(".jsonl")
        if not world.any(path.is_file()):  # a run that goes on must find the very answers it began with
            said = [_answers(side, texts, tokenizer, settings, length, name, console) for side in sides]
            if world.is_first:
                own_folder(out)
                write_text(path, "".join(json.dumps(side, ensure_ascii=False) + "\n" for side in said))
            world.wait()
        to_learn, held_out = map(json.loads, path.read_bytes().splitlines())
        tuning = SFTSettings(
            start=settings.start, replay=1 - settings.own_share,
            **{field: getattr(settings, field) for field in OptimizerSettings.model_fields},
        )  # fmt: skip
        flops = math.ceil(settings.tokens / length) * pass_flops(student.config, (1, length))
        done = fine_tune(
            student, tokenizer, tuning, out=out, conversations=Conversations(to_learn, held_out, {}),
            replay_shards=shards, seed=seed, flops=flops, name=name, verify=verify, world=world, console=console,
        )  # fmt: skip
        teacher.to(world.device)
        done.summary.update(acceptance=acceptance(teacher, student, text), own_rows=len(to_learn))
        return done
    if n_own <= length:
        own = np.empty((0, length + 1), np.int64)
    else:
        if not world.any(path.is_dir()):  # the same
            prompts = [ids[: length // 2] for _, ids in sides[0]] if sides else [[tokenizer.end_of_text_id]]
            stream: list[int] = []
            with console.bar(f"{name}: own text", n_own) as bar:
                for written, _ in texts(itertools.cycle(prompts)):
                    stream += written
                    bar.update(min(len(stream), n_own))
                    if len(stream) >= n_own:
                        break
            rows = torch.tensor(stream[: n_own // (length + 1) * (length + 1)]).view(-1, length + 1)
            if world.is_first:
                own_folder(out)
                with atomic_folder(path) as folder:
                    write_tensors(folder / "rows.safetensors", {"rows": rows})
            world.wait()
        own = load_file(path / "rows.safetensors")["rows"].numpy()
    source = DistillRows(text, own, settings.own_share if len(own) else 0.0, seed)
    job = TrainingJob(
        name=name,
        modules={"model": student},
        frozen={"teacher": teacher.eval().requires_grad_(False)},
        objective=Distillation(teacher.config),
        source=source,
        settings=settings,
        n_rows=math.ceil(settings.tokens / length),
        folder=out,
        seed=seed,
        start=start,
        row_length=length,
        score=scores_during(settings.evaluate, tokenizer),
    )
    summary = train(job, world, console)
    summary |= {"acceptance": acceptance(teacher, student, source), "own_rows": len(own)}
    save_model(out / "model", student, tokenizer, world=world)
    forget_checkpoints(job, world)
    return TrainedModel(student, out, summary)


@dataclass(frozen=True)
class Distillation:
    """KL(teacher ‖ student) at every position that has a target, in nats.

    Attributes:
        teacher: its shape, for the FLOPs of its passes.
    """

    teacher: ModelConfig

    def counts(self, batch: Batch) -> dict[str, float]:
        """Positions that have a target."""
        return {"loss": int((batch["targets"] != IGNORED).sum())}

    def terms(self, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, Term]:
        """One pass of each model; no more logits than a slice's are held."""
        mask = (batch["targets"] != IGNORED).flatten()
        with torch.no_grad():
            theirs, output = modules["teacher"](batch["ids"], head=_states)
        student = modules["model"]
        loss = student(batch["ids"], head=lambda hidden, own: _divergence_sum(hidden, own, theirs, output, mask))
        balance = student.balance_loss()  # type: ignore[operator]
        return {"loss": Term(loss if balance is None else loss + balance, loss.detach())}

    def flops(self, config: ModelConfig, shape: Sequence[int]) -> float:
        """The student's forward and backward pass, and the teacher's forward pass."""
        return pass_flops(config, shape) + shape[0] * forward_flops(self.teacher, shape[1])


class DistillRows:
    """Rows of text, and of what the teacher wrote; each a pure function of (seed, place).

    Args:
        text: rows of the run's shards; its validation is this source's.
        own: (n, length + 1): what the teacher wrote.
        share: of the rows that are taken from it.
        seed: of the order.
    """

    def __init__(self, text: ShardBatches, own: np.ndarray, share: float, seed: int) -> None:
        self._text, self._own = text, own
        self._shares = Shares(integer_weights([1 - share, share]), seed) if 0 < share < 1 else None
        self._is_own = share == 1
        self.fingerprint = value_digest([text.fingerprint, own.tolist(), share, seed])

    def rows(self, first: int, last: int) -> Batch:
        """Rows `first` … `last` − 1 of the endless order."""
        places = np.arange(first, last)
        component, number = self._shares(places) if self._shares else (np.full_like(places, self._is_own), places)
        batch = self._text.rows(first, last)
        for place in np.flatnonzero(component):
            row = torch.from_numpy(self._own[number[place] % len(self._own)])
            width = batch["ids"].shape[1]
            batch["ids"][place], batch["targets"][place] = row[:width], row[1 : width + 1]
        return batch

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Batch]:
        """Of the run's text."""
        return self._text.validation(batch_size, limit_tokens)


@torch.inference_mode()
def acceptance(teacher: Transformer, student: Transformer, source: DistillRows | ShardBatches) -> float:
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


def _states(hidden: Tensor, output: OutputLayer) -> tuple[Tensor, OutputLayer]:
    return hidden, output


def _divergence_sum(
    hidden: Float[Tensor, "batch seq d_model"],
    own: OutputLayer,
    theirs: Float[Tensor, "batch seq d_teacher"],
    output: OutputLayer,
    mask: Tensor,
) -> Float[Tensor, ""]:
    """Σ over masked positions of KL(teacher ‖ student), slice by slice; each slice is computed again backwards."""

    def of_slice(hidden: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
        q, p = own.logits(hidden).log_softmax(dim=-1), output.logits(theirs).log_softmax(dim=-1)
        return (p.exp() * (p - q)).sum(dim=-1)[mask].sum()

    n_rows = max(1, _SLICE_LOGITS // own.vocab_size)
    parts = (torch.split(part.flatten(0, -2), n_rows) for part in (hidden, theirs))
    slices = zip(*parts, torch.split(mask, n_rows), strict=True)
    return torch.stack([checkpoint(of_slice, *part, use_reentrant=False) for part in slices]).sum()


def _questions(
    tokenizer: Tokenizer, settings: DistillSettings, seed: int, name: str, console: Console
) -> list[list[tuple[list[Message], list[int]]]]:
    """What the teacher answers, as messages and as ids: to learn from, and held out.

    Raises:
        DataError: no conversation begins with a question.
    """
    found = load_conversations(settings.prompts, 10_000, seed, f"align.{name}", console)
    sides = [[talk[:-1] for talk in side if len(talk) > 1] for side in (found.train, found.held_out)]
    if not all(sides):
        raise DataError(f"[align.{name}] prompts: no conversation has a question before its answer.")
    return [[(talk, render(tokenizer, talk, add_generation_prompt=True).ids) for talk in side] for side in sides]


def _texts(
    teacher: Transformer, tokenizer: Tokenizer, settings: DistillSettings, length: int, seed: int, world: World,
    prompts: Iterable[list[int]],
) -> Iterator[tuple[list[int], bool]]:  # fmt: skip
    """What the teacher writes behind each prompt, with the token that ended it, and whether one did.

    The same in one process and in many, which each write a share.
    """
    dtype, _ = choose_precision(settings.precision, next(teacher.parameters()).device.type)
    engine = Engine(teacher, tokenizer, slots=32, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
    waiting, place = iter(prompts), 0
    while chunk := list(itertools.islice(waiting, world.size * _TEXTS_AT_ONCE)):
        chunk += [chunk[-1]] * (-len(chunk) % world.size)
        requests = []
        for number, ids in list(enumerate(chunk, start=seed + place))[world.rows(len(chunk))]:
            params = SamplingParams(temperature=settings.temperature, max_tokens=length - len(ids) + 1)
            requests.append(Request(ids, params, seed=number))
        place += len(chunk)
        texts = torch.full((len(requests), length + 3), -1)
        for row, request, (text,) in zip(texts, requests, engine.run(requests), strict=True):
            ids = [*request.ids, *text.ids, *([] if text.end_id is None else [text.end_id])]
            row[: len(ids)], row[-1] = torch.tensor(ids), text.end_id is not None
        for row in world.gather(texts).tolist():
            yield [token for token in row[:-1] if token >= 0], row[-1] == 1


def _answers(
    questions: Sequence[tuple[list[Message], list[int]]], texts: Callable[..., Iterator[tuple[list[int], bool]]],
    tokenizer: Tokenizer, settings: DistillSettings, length: int, name: str, console: Console,
) -> list[list[Message]]:  # fmt: skip
    """Conversations whose last answers are the teacher's; those without an end are left out.

    Raises:
        DataError: no answer came to its end.
    """
    asked = [(talk, ids) for talk, ids in questions if len(ids) <= length // 2]
    said: list[list[Message]] = []
    n_tokens = 0
    with console.bar(f"{name}: answers", settings.own_tokens) as bar:
        for (talk, ids), (text, is_ended) in zip(asked, texts(ids for _, ids in asked), strict=False):
            n_tokens += len(text) - len(ids)
            bar.update(min(n_tokens, settings.own_tokens))
            if is_ended:
                said.append([*talk, {"role": "assistant", "content": tokenizer.decode(text[len(ids) :])}])
            if n_tokens >= settings.own_tokens:
                break
    if not said:
        raise DataError(
            f"[align.{name}] prompts: no answer came to its end within the context of {length} tokens.",
            "Start from a model that has learned to answer.",
        )
    return said


def _student_config(stage: Stage) -> ModelConfig:
    settings: DistillSettings = stage.settings
    teacher, _ = starting_config(stage)
    length = settings.model.context_length or teacher.context_length
    return settings.model.model_copy(update={"context_length": length}).config(teacher.vocab_size)


class DistillMethod(Method):
    """The stage: a draft of a model."""

    settings = DistillSettings
    version = 1
    makes = "lm"
    trains = True
    is_default = False
    figures = ("val_loss", "final_loss", "acceptance")

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """The text."""
        return ("shards",)

    def outside(self, stage: Stage) -> dict[str, str]:
        """A model made elsewhere, and prompts."""
        settings: DistillSettings = stage.settings
        start = stage.outside_start
        digests = {} if start is None else {"start": model_digest(start)}
        if settings.prompts:
            digests["prompts"] = ",".join(data_fingerprint(settings.prompts, stage.section))
        return digests

    def sections(self, stage: Stage) -> tuple[Section, ...]:
        """Its own, the student in it."""
        return (stage.settings,)

    def checks(self, stage: Stage) -> Iterable[Check]:
        """Models and text."""
        yield f"[{stage.section}] start", lambda: check_start(stage)
        yield f"[{stage.section}] model", lambda: _student_config(stage)
        yield f"[{stage.section}]", lambda: _check_text(stage)

    def check_memory(self, stage: Stage) -> None:
        """Refuse what cannot fit; the frozen teacher is not counted beside the student's states."""
        config, world = _student_config(stage), current_world()
        length, available = config.context_length, device_memory(world)
        Workload(config, stage.settings, length, available, world.size, stage.section).refuse_what_cannot_fit()

    def quick(self, settings: DistillSettings) -> DistillSettings:
        """A few steps, and little of the teacher's own text."""
        less = {"tokens": min(settings.tokens, 40_000), "own_tokens": min(settings.own_tokens, 4_000)}
        return settings.model_copy(update=less | QUICK_VALIDATION)

    def work(self, context: Context) -> dict[str, Any]:
        """See `distill`."""
        stage, recipe = context.stage, context.recipe
        teacher, tokenizer = starting_point(stage, context.run, context.console)
        student = Transformer(_student_config(stage), seed=recipe.seed)
        start = model_digest(stage.outside_start or context.run.folder(stage.settings.start) / "model")
        return distill(
            teacher, student, tokenizer, context.run.folder("shards"), stage.settings, out=context.folder,
            seed=recipe.seed, start=start, name=stage.name, verify=recipe.verify, world=context.world,
            console=context.console,
        ).summary  # fmt: skip

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """How often its guesses are right."""
        share = summary.get("acceptance")
        facts = [
            ("guesses kept", "" if share is None else f"{share:.1%}"),
            ("rows of the model's own text", format_whole(summary.get("own_rows"))),
        ]
        lines = format_lines((share, lambda value: f"{value:.0%} of guesses kept"), loss_line(summary))
        return Shown("Distillation", [*facts, *training_facts(summary)], lines)


def _check_text(stage: Stage) -> None:
    """Hold that there is text in the model's tokens.

    Raises:
        DataError: there is none.
    """
    if not stage.recipe.reads_text:
        raise DataError(
            f"[{stage.section}]: there are no token shards to learn from.",
            "Give the recipe a [corpus] like the model's.",
        )
    if stage.recipe.has_trunk and stage.outside_start is not None and starting_tokenizer(stage) is not None:
        raise DataError(
            f"[{stage.section}] start: a model made elsewhere in a recipe that pretrains its own: their tokens differ.",
            "Distil it in a recipe of its own.",
        )


DISTILL = DistillMethod()
