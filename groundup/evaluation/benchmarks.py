"""What a model is scored on: the protocol of a task, and tasks from local files (benchmarks).

A benchmark is a description in TOML and the rows of a file. Those that ship are described in
`groundup/data/benchmarks.toml`; anybody's own JSON lines, CSV or Parquet needs a few lines like these. Three kinds: a
`choice` compares log-likelihoods; of a `generation` what the model writes is graded, by comparing it with an answer or,
of `code`, by running it; a `text` is scored token by token. Tasks without files are in `sets.py`.

Texts of a description are Jinja templates over the fields of a row, rendered in a sandbox.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import os
import random
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, runtime_checkable

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from groundup.corpus.document import SetAside
from groundup.corpus.reading.refusal import RefusedError
from groundup.corpus.reading.sources import InputFile, find_sources
from groundup.corpus.reading.values import check_writable, read_values
from groundup.errors import DataError
from groundup.evaluation.metrics import f1
from groundup.evaluation.sandbox import check_sandbox, run_program
from groundup.evaluation.text_metrics import rouge, rouge_scorer
from groundup.files import read_shipped, value_digest
from groundup.generation import SamplingParams
from groundup.recipe import CorpusSettings, EvaluateSettings
from groundup.untrusted import MOST_CONFIG_BYTES, read_bytes, reading

Kind = Literal["choice", "generation", "code", "text"]
_PASS_AT_K_TEMPERATURE = 0.8  # several programs for a problem are drawn (arXiv:2107.03374, section 3.3)


@dataclass(frozen=True)
class Item:
    """One question of a task."""

    number: int  # from 0, in the order of the files
    group: str  # the part it belongs to
    context: str  # what stands before every choice, shots included; of a choice between contexts, ""
    contexts: tuple[str, ...] = ()  # one for each choice, where they differ
    choices: tuple[str, ...] = ()  # the continuations, delimiter included; of a generation none
    gold: int = 0  # number of the right choice
    target: str = ""  # the right answer of a generation; the text, of a text; the program around an answer, of code
    row: Mapping[str, Any] = field(default_factory=dict)  # the fields, for a program; of a generated set, what is asked

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation) of each choice."""
        return list(zip(self.contexts or [self.context] * len(self.choices), self.choices, strict=True))


@dataclass(frozen=True)
class Reply:
    """What a model wrote."""

    text: str  # without what ended it; behind a call of the calculator, what follows the result
    is_ended: bool = True  # by a token or a stop text, and not cut off
    n_tokens: int = 0  # that were written, the end included
    logprob: float | None = None  # of these tokens at temperature 1, in nats, where the task asks for it
    start_logprob: float | None = None  # the same by the model that this one was trained from, where it is at hand


class EvaluationTask(Protocol):
    """What a model can be scored on."""

    @property
    def name(self) -> str:
        """As results say it."""

    @property
    def kind(self) -> Kind:
        """What the model does; code is written as any generation is."""

    def read(self, settings: EvaluateSettings, seed: int) -> list[Item]:
        """Its items. Raises DataError: they are not there, or damaged."""


@runtime_checkable
class GenerationTask(EvaluationTask, Protocol):
    """One for which the model writes."""

    @property
    def is_chat(self) -> bool:
        """Its items are always messages, through the model's chat template."""

    def sampling(self, settings: EvaluateSettings) -> tuple[SamplingParams, int]:
        """How replies are written, and how many for each item."""

    def grade(self, item: Item, replies: Sequence[Reply], settings: EvaluateSettings) -> dict[str, Any]:
        """What becomes the item's record.

        "outcomes" are values by figure: true and false become a share, numbers a mean, pairs a ratio of sums. Of code,
        "passed" has one flag for each reply. What else it holds is kept beside them.
        """


def _compilable(source: str) -> str:
    try:
        re.compile(source)
    except re.error as error:
        raise ValueError(f"{source!r} is no regular expression: {error}") from error
    return source


Regex = Annotated[str, AfterValidator(_compilable)]


class Benchmark(BaseModel):
    """What a benchmark asks, and what is right."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w-][\w .-]*$")  # also of a file of its records
    kind: Kind
    files: str = Field(description="of its items: a name or a glob below the data folder, or a path")
    columns: tuple[str, ...] = Field((), description="names of a CSV's columns, where its first line is a row")
    group: str = Field("", description="to which part an item belongs; {{ file }} is its file's name without ending")
    shots_from: str = Field("", description="file of the worked examples (unset: the items' own, but for the item)")
    header: str = Field("", description="stands before the worked examples")
    context: str = Field("", description="what the model is given")
    contexts: str = Field("", description="field with one context for each choice, in place of context")
    choices: str | tuple[str, ...] = Field((), description="field that lists the choices, or the choices themselves")
    continuation: str = Field("", description="what follows the context, in place of choices")
    gold: str = Field("0", description="number of the right choice, from 0")
    delimiter: str = Field(" ", description="between context and choice")
    unconditional: str = Field("", description="context without the question, for accuracy normalized by PMI")
    target: str = Field("", description="of a generation: the right answer, worked out where there are shots")
    answer: tuple[Regex, ...] = Field((), description="patterns whose last match is the answer (strict)")
    flexible: tuple[Regex, ...] = Field((), description="patterns whose last match is the answer where strict has none")
    ignore: tuple[Regex, ...] = Field((), description="patterns taken out of both answers before they are compared")
    program: str = Field("", description="of code: what is run; {{ completion }} is what the model wrote")
    stop: tuple[str, ...] = Field((), description="texts that end a generation")
    max_tokens: int = Field(128, ge=1, description="of a generation")
    rouge: bool = Field(False, description="of a generation: ROUGE-1, -2 and -L of the answer, too")
    text: str = Field("text", description="field of a text, where the file has fields")
    chance: float | None = Field(None, ge=0, lt=1, description="accuracy without knowledge (unset: 1 / choices)")
    core_shots: int | None = Field(None, ge=0, description="worked examples in DCLM's CORE (unset: it is no part)")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        """What its kind cannot do without."""
        if self.kind == "choice" and not (self.choices or self.continuation):
            raise ValueError("a choice has choices, or a continuation")
        for kind, need in (("generation", "target"), ("code", "program")):
            if self.kind == kind and not getattr(self, need):
                raise ValueError(f"{kind} has a {need}")
        return self

    @property
    def is_chat(self) -> bool:
        """Only where `[evaluate] chat` asks for it."""
        return False

    def read(self, settings: EvaluateSettings, seed: int) -> list[Item]:
        """See `check` and `read_items`."""
        self.check(settings)
        return read_items(self, settings.data, shots=settings.shots, seed=seed, limit=settings.limit)

    def check(self, settings: EvaluateSettings) -> None:
        """Hold that it can be asked so, and that this machine can grade what the model will have written.

        Raises:
            DataError: worked examples of code or a text; nothing isolates its programs, and the settings do not allow
                that.
            GroundupError: rouge-score is not installed.
        """
        if settings.shots and self.kind in ("code", "text"):
            what = f'benchmark {self.name}: kind = "{self.kind}" has no worked examples, and shots = {settings.shots}.'
            raise DataError(what, "Leave shots out, or score it in a call of its own.")
        if self.kind == "code":
            check_sandbox(allow_unisolated=settings.unisolated_code)
        if self.rouge:
            rouge_scorer()

    def digest(self, data: str | Path, shots: int) -> str:
        """What stands for its description and files; of many files only names and contents are read.

        Raises:
            DataError: a file is missing.
        """
        # A name that holds an item's group may be any file in that place.
        files = [self.files, *([re.sub(r"{{.*?}}", "*", self.shots_from)] if shots and self.shots_from else [])]
        found = [source for name in files for source in _sources(self, name, data)]
        return value_digest([self.model_dump(), {source.label: source.digest() for source in found}])

    def sampling(self, settings: EvaluateSettings) -> tuple[SamplingParams, int]:
        """Greedily up to a stop text; several programs for a problem are drawn."""
        n = settings.samples if self.kind == "code" else 1
        temperature = _PASS_AT_K_TEMPERATURE if n > 1 else 0.0
        return SamplingParams(temperature=temperature, max_tokens=self.max_tokens, stop=self.stop), n

    def grade(self, item: Item, replies: Sequence[Reply], settings: EvaluateSettings) -> dict[str, Any]:
        """Compare the answer in a reply with the right one, or run the programs."""
        if self.kind == "code":
            programs = [render_program(self, item, reply.text) for reply in replies]
            done = [run_program(program, allow_unisolated=settings.unisolated_code) for program in programs]
            return {"passed": [one.passed for one in done], "reasons": [one.reason for one in done]}
        # A target without the pattern is the answer itself; a reply without it is no answer.
        target = extract_answer(self, item.target, is_flexible=True) or item.target.strip()
        strict, flexible = (extract_answer(self, replies[0].text, is_flexible=flag) for flag in (False, True))
        outcomes = {"exact_match": strict == target, "exact_match_flexible": flexible == target}
        shares = {"f1": f1(flexible, target), **(rouge(flexible, target) if self.rouge else {})}
        return {"target": target, "answer": flexible, "outcomes": {**outcomes, **shares}}


def find_benchmark(name: str, others: Iterable[str] = ()) -> Benchmark:
    """A benchmark that ships, or the one that a TOML file describes.

    Args:
        name: "arc_easy", or the path of a `.toml` file.
        others: tasks that are no benchmarks, for the error.

    Raises:
        DataError: there is none of that name, or its description is wrong.
    """
    if name.endswith(".toml"):
        path = Path(name)
        with reading(str(path), DataError, "A benchmark is described in TOML."):
            fields = tomllib.loads(read_bytes(path, MOST_CONFIG_BYTES).decode())
            return _described({"name": path.stem, **fields}, str(path))
    shipped = read_shipped("benchmarks")
    if name not in shipped:
        every = [*others, *shipped]
        near = difflib.get_close_matches(name, every, n=1)
        known = f"There are: {', '.join(every)}; or name a file, mine.toml."
        fix = f"Did you mean {near[0]!r}? {known}" if near else known
        raise DataError(f"{name!r} is no {'task' if others else 'benchmark'}.", fix)
    return _described({"name": name, **shipped[name]}, f"benchmark {name}")


def read_items(
    benchmark: Benchmark, data: str | Path, *, shots: int = 0, seed: int = 1, limit: int | None = None
) -> list[Item]:
    """The items of a benchmark.

    Worked examples are drawn once for each group, so that items share their beginning; one that is the item itself, in
    whatever file, is passed over.

    Args:
        benchmark: which.
        data: folder of its files.
        shots: worked examples before each item.
        seed: of the draw.
        limit: most items, drawn evenly over the files.

    Raises:
        DataError: a file is missing or damaged, or a row lacks what the description names, with file and line.
    """
    rows = [*_rows(benchmark, benchmark.files, data)]
    if limit is not None and limit < len(rows):
        rows = [rows[place] for place in sorted(random.Random(f"{seed}/items").sample(range(len(rows)), limit))]
    examples = functools.cache(lambda files: [_item(benchmark, row) for row in _rows(benchmark, files, data)])
    drawn: dict[str, list[Item]] = {}
    items = []
    for row in rows:
        with reading(row.place, DataError):
            item = _item(benchmark, row)
        if shots:
            files = _render(benchmark.shots_from or benchmark.files, row, {"group": item.group})
            if item.group not in drawn:
                pool = examples(files)
                if not benchmark.shots_from:  # what comes as examples is taken in its order
                    pool = [one for one in pool if one.group == item.group]
                    random.Random(f"{seed}/shots").shuffle(pool)
                drawn[item.group] = pool
            item = _with_shots(benchmark, item, row, drawn[item.group], shots)
        items.append(item)
    return items


def fingerprint(task: EvaluationTask, items: Sequence[Item]) -> str:
    """What stands for a task's items, shots and description in a result."""
    described = task.model_dump() if isinstance(task, Benchmark) else task.name
    told = [
        [item.context, item.contexts, item.choices, item.gold, item.target, repr(item.row.get("asked"))]
        for item in items
    ]
    return value_digest([described, told])


@dataclass(frozen=True)
class _Row:
    """A row, and where it stands."""

    number: int
    place: str
    fields: dict[str, Any]


def _with_shots(benchmark: Benchmark, item: Item, row: _Row, drawn: Sequence[Item], shots: int) -> Item:
    asked = (item.context, item.contexts)
    others = [*itertools.islice((shot for shot in drawn if (shot.context, shot.contexts) != asked), shots)]
    if len(others) < shots:
        raise DataError(f"benchmark {benchmark.name}: {len(others)} worked examples, {shots} wanted.", "Ask for fewer.")
    before = _render(benchmark.header, row, {"group": item.group})
    for shot in others:
        context, right = shot.pairs[shot.gold] if shot.choices else (shot.context, benchmark.delimiter + shot.target)
        before += f"{context}{right}\n\n"
    return replace(item, context=before + item.context, contexts=tuple(before + one for one in item.contexts))


def _item(benchmark: Benchmark, row: _Row) -> Item:
    """The item in a row, without shots."""
    fields = row.fields
    contexts = tuple(map(str, _list(fields, benchmark.contexts, row))) if benchmark.contexts else ()
    choices: tuple[str, ...] = ()
    gold = 0
    if benchmark.kind == "choice":
        if benchmark.continuation:
            told = [_render(benchmark.continuation, row)] * max(1, len(contexts))
        elif isinstance(benchmark.choices, str):
            told = _list(fields, benchmark.choices, row)
        else:
            told = [_render(choice, row) for choice in benchmark.choices]
        choices = tuple(benchmark.delimiter + str(choice) for choice in told)
        if contexts and len(contexts) != len(choices):
            raise DataError(f"{row.place}: {len(contexts)} contexts and {len(choices)} choices.")
        if benchmark.delimiter in choices:
            raise DataError(f"{row.place}: a choice is empty, and so has no log-likelihood.")
        numbers = [*map(str, range(len(choices)))]
        if (said := _render(benchmark.gold, row).strip()) not in numbers:
            raise DataError(f"{row.place}: {said!r} is none of the numbers 0 to {numbers[-1]} of its choices.")
        gold = int(said)
    group = _render(benchmark.group, row)
    if benchmark.kind == "text":
        if benchmark.text not in fields:
            raise DataError(f"{row.place}: no field {benchmark.text!r}.", f"Its fields: {', '.join(fields)}.")
        context, target = "", str(fields[benchmark.text])
    else:
        target = benchmark.program and _render(benchmark.program, row, {"completion": ""})
        context, target = _render(benchmark.context, row), target or _render(benchmark.target, row)
    if benchmark.kind in ("text", "generation") and not target.strip():
        raise DataError(f"{row.place}: its {'text' if benchmark.kind == 'text' else 'right answer'} is empty.")
    try:
        check_writable("".join((group, context, *contexts, *choices, target)))
    except RefusedError as error:
        raise DataError(f"{row.place}: {error}.") from error
    return Item(row.number, group, context, contexts, choices, gold, target, fields)


def _list(fields: Mapping[str, Any], name: str, row: _Row) -> list[Any]:
    found = fields.get(name)
    if not isinstance(found, list | tuple) or len(found) < 2:
        raise DataError(f"{row.place}: its field {name!r} is no list of two or more.", "[…] choices names the field.")
    if not all(isinstance(one, str | int | float) for one in found):
        raise DataError(f"{row.place}: its field {name!r} lists what is neither a text nor a number.")
    return list(found)


def _sources(benchmark: Benchmark, files: str, data: str | Path) -> list[InputFile]:
    own = Path(data) / files  # of an absolute path, that
    pattern = files if os.path.isfile(files) and not own.is_file() else str(own)
    return find_sources([pattern], setting=f"benchmark {benchmark.name}, or its data folder").files


def _rows(benchmark: Benchmark, files: str, data: str | Path) -> Iterator[_Row]:
    """Every row of its files; a text is one row."""
    numbers = itertools.count()
    for source in _sources(benchmark, files, data):
        name = Path(source.label).name.split(".")[0]
        if benchmark.kind == "text" and source.kind == "text":
            with source.open() as handle:
                yield _Row(
                    next(numbers), f"{source.label}, whole", {"file": name, benchmark.text: handle.read().decode()}
                )
        else:
            for place, fields in _records(benchmark, source):
                yield _Row(next(numbers), f"{source.label}, {place}", {"file": name, **fields})


def _records(benchmark: Benchmark, source: InputFile) -> Iterator[tuple[str, dict[str, Any]]]:
    names = list(benchmark.columns)

    def refuse(aside: SetAside) -> None:
        raise DataError(f"benchmark {benchmark.name}: {aside}", "Mend the file: an item left out changes the score.")

    for value in read_values(source, CorpusSettings(text_field=""), refuse):
        fields = value.data
        if source.kind == "separated":
            if not names:
                names = fields
                continue
            if len(fields) != len(names):
                raise DataError(f"{source.label}, line {value.number}: {len(fields)} cells, {len(names)} columns.")
            fields = dict(zip(names, fields, strict=True))
        if not isinstance(fields, dict):
            raise DataError(f"{source.label}, {value.place} {value.number}: is no object with fields.")
        yield f"{value.place} {value.number}", fields


_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
_template = functools.lru_cache(maxsize=256)(_ENVIRONMENT.from_string)


def _render(source: str, row: _Row, more: Mapping[str, Any] | None = None) -> str:
    if "{" not in source:
        return source
    try:
        return _template(source).render(row.fields | dict(more or {}))
    except Exception as error:  # a template is a program: whatever it throws
        have = ", ".join(map(str, row.fields))
        raise DataError(f"{row.place}: {source!r} cannot be filled: {error}.", f"Its fields: {have}.") from error


def render_program(benchmark: Benchmark, item: Item, completion: str) -> str:
    """The program that shows whether a completion is right."""
    return _render(benchmark.program, _Row(item.number, f"item {item.number}", {**item.row, "completion": completion}))


def extract_answer(benchmark: Benchmark, text: str, *, is_flexible: bool) -> str:
    """The answer in a text: the last match of the patterns, without what is ignored; "" if there is none."""
    for pattern in (*benchmark.answer, *(benchmark.flexible if is_flexible else ())):
        found = list(re.finditer(pattern, text))
        if found:
            text = next((group for group in found[-1].groups() if group), found[-1].group())
            break
    else:
        if benchmark.answer or benchmark.flexible:
            return ""
    for pattern in benchmark.ignore:
        text = re.sub(pattern, "", text)
    return text.strip()


def _described(fields: dict[str, Any], where: str) -> Benchmark:
    if (like := str(fields.pop("like", ""))) and like not in (shipped := read_shipped("benchmarks")):
        raise DataError(f"{where}: like = {like!r} is no benchmark that ships.", f"Those are: {', '.join(shipped)}.")
    if like:
        own = {"chance", "core_shots"}  # of those items, and no others
        fields = {**find_benchmark(like).model_dump(exclude_unset=True, exclude=own), **fields}
    try:
        return Benchmark.model_validate(fields)
    except ValidationError as error:
        wrong = [": ".join([*map(str, one["loc"]), one["msg"].removeprefix("Value error, ")]) for one in error.errors()]
        fix = f"A description has {', '.join(Benchmark.model_fields)}."
        raise DataError(f"{where}: {'; '.join(wrong)}.", fix) from error
