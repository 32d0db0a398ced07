"""One task, one model: what the model made of every item, and the figures with error bars that follow from it.

What was found of an item is a line of a file, written every so many items (of answers, which take long, every 32),
under a fingerprint of model, items and decoding; the same command goes on from there. Figures are functions of these
lines alone, so that two models can be compared item by item, and the figures recomputed without a model.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from groundup.errors import ArtifactError, DataError
from groundup.evaluation.benchmarks import Benchmark, EvaluationTask, GenerationTask, Item, Kind, Reply
from groundup.evaluation.likelihood import encode_pairs, score_ids
from groundup.evaluation.metrics import FEWEST_UNITS, Estimate, mean, ratio_estimate, score_windows, share, text_units
from groundup.evaluation.text_metrics import ROUGE
from groundup.files import write_text
from groundup.generation import SamplingParams, generate_batch
from groundup.generation.rollouts import use_calculator
from groundup.model import Transformer
from groundup.recipe import EvaluateSettings
from groundup.tokenizer import Tokenizer, render

Record = dict[str, Any]
_CHUNK: dict[Kind, int] = {"choice": 512, "text": 512, "generation": 32, "code": 32}  # items between two writes
_BINS = 10  # of the expected calibration error
_RESAMPLES = 1000  # for the standard error of the calibration error
USUAL = EvaluateSettings()


def measure(
    model: Transformer,
    tokenizer: Tokenizer,
    task: EvaluationTask,
    items: Sequence[Item],
    *,
    settings: EvaluateSettings = USUAL,
    seed: int = 1,
    start: Transformer | None = None,
    kept: Path | None = None,
    identity: str = "",
    advance: Callable[[int], object] | None = None,
) -> list[Record]:
    """Put every item to a model.

    Args:
        model: put into evaluation mode.
        tokenizer: of the model.
        task: of the items.
        items: what the task read.
        settings: how items are put and replies are written.
        seed: of what is drawn.
        start: the model that this one was trained from, for the style.
        kept: file of the records; those that stand there under the same identity are not made again.
        identity: what stands for model, tokenizer, items and decoding.
        advance: is told how many items are done.

    Returns:
        One record an item, in their order. A choice: "logprob", "tokens" and "bytes" of each choice, "characters",
        "unconditional" where the description has such a context, "greedy", "gold", "chance". A generation: "prompt",
        "reply", "tokens" that were written, and what its task grades. A text: "bits" and "bytes" of its windows.
    """
    done = kept_records(kept, identity)
    waiting = [item for item in items if item.number not in done]
    work: Callable[[Sequence[Item]], list[Record]]
    if isinstance(task, Benchmark) and task.kind == "choice":
        work = partial(_choices, model, tokenizer, task, is_chat=settings.chat)
    elif task.kind == "text":
        work = partial(_texts, model, tokenizer, is_short=len(items) < FEWEST_UNITS)
    else:
        assert isinstance(task, GenerationTask)
        work = partial(_generations, model, tokenizer, task, settings=settings, seed=seed, start=start)
    for first in range(0, len(waiting), size := _CHUNK[task.kind]):
        chunk = waiting[first : first + size]
        for item, record in zip(chunk, work(chunk), strict=True):
            done[item.number] = {"item": item.number, "group": item.group, **record}
        if kept is not None:
            lines = [json.dumps(record, ensure_ascii=False) for record in ({"identity": identity}, *done.values())]
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, "\n".join([*lines, ""]))
        if advance is not None:
            advance(len(done))
    return [done[item.number] for item in items]


def asked_ids(tokenizer: Tokenizer, context: str, *, is_chat: bool) -> list[int]:
    """What a model is given before it answers: a context as it stands, or as a message of the user.

    Control tokens that a text spells stay text.
    """
    if is_chat:
        return render(tokenizer, [{"role": "user", "content": context}], add_generation_prompt=True).ids
    return tokenizer.encode(context) or [tokenizer.end_of_text_id]


def _choices(
    model: Transformer, tokenizer: Tokenizer, task: Benchmark, items: Sequence[Item], *, is_chat: bool
) -> list[Record]:
    before = task.unconditional
    free = list(dict.fromkeys((before, choice) for item in items for choice in item.choices)) if before else []
    pairs = [pair for item in items for pair in item.pairs]
    requests = encode_pairs(tokenizer, pairs + free)
    if is_chat:  # but for a sentence of a minimal pair, which answers nobody
        prompt = functools.cache(partial(asked_ids, tokenizer, is_chat=True))
        answers = tokenizer.encode_batch([choice.removeprefix(task.delimiter) for _, choice in pairs + free])
        requests = [
            (prompt(context), answer or [tokenizer.end_of_text_id]) if context else plain
            for (context, _), answer, plain in zip(pairs + free, answers, requests, strict=True)
        ]
    scored = score_ids(model, requests)
    told, without = iter(scored), dict(zip(free, scored[len(pairs) :], strict=True))
    records = []
    for item in items:
        own = [next(told) for _ in item.choices]
        texts = [choice.removeprefix(task.delimiter) for choice in item.choices]
        record: Record = {
            "gold": item.gold,
            "logprob": [one.logprob for one in own],
            "tokens": [one.n_tokens for one in own],
            "characters": [len(text) for text in texts],
            "bytes": [len(text.encode()) for text in texts],
            "greedy": [one.is_greedy for one in own],
            "chance": (1 / len(own) if len(own) > 1 else 0.0) if task.chance is None else task.chance,
        }
        if before:
            record["unconditional"] = [without[before, choice].logprob for choice in item.choices]
        records.append(record)
    return records


def _generations(
    model: Transformer, tokenizer: Tokenizer, task: GenerationTask, items: Sequence[Item], *,
    settings: EvaluateSettings, seed: int, start: Transformer | None,
) -> list[Record]:  # fmt: skip
    params, n = task.sampling(settings)
    params = replace(params, max_tokens=min(params.max_tokens, model.config.context_length - 1))
    is_chat = task.is_chat or settings.chat
    prompts = [asked_ids(tokenizer, item.context, is_chat=is_chat) for item in items for _ in range(n)]
    seeds = [seed * 1_000_003 + item.number * n + k for item in items for k in range(n)]
    replies = write_replies(model, tokenizer, prompts, params, seeds, has_calculator=is_chat, start=start)
    with ThreadPoolExecutor(2) as pool:  # of programs
        own = [replies[place : place + n] for place in range(0, len(replies), n)]
        graded = list(pool.map(partial(task.grade, settings=settings), items, own))
    return [
        {"prompt": item.context, "reply": one[0].text, "tokens": sum(reply.n_tokens for reply in one), **found}
        for item, one, found in zip(items, own, graded, strict=True)
    ]


def write_replies(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[list[int]], params: SamplingParams,
    seeds: Sequence[int], *, has_calculator: bool = False, start: Transformer | None = None,
) -> list[Reply]:  # fmt: skip
    """What a model writes to each prompt, in their order.

    Args:
        model: put into evaluation mode.
        tokenizer: of the model.
        prompts: token ids.
        params: how tokens are drawn; with `logprobs`, replies have log-probabilities.
        seeds: of each prompt.
        has_calculator: a reply that calls it is followed by its result and another reply, where nothing is drawn.
        start: gives the same replies log-probabilities of its own, where they have some.
    """
    # Prompts of like lengths together: little padding to compute.
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    write = partial(generate_batch, model, tokenizer, params=params)
    results = dict(zip(order, write([prompts[at] for at in order], seeds=[seeds[at] for at in order]), strict=True))
    n_before = dict.fromkeys(order, 0)
    if has_calculator and params.temperature == 0:
        use = use_calculator(tokenizer)
        again = {
            place: [*prompts[place], *reply.ids, reply.end_id, *turn]
            for place, reply in results.items()
            if reply.end_id is not None and (turn := use(reply.text)) is not None
        }
        n_before |= {place: results[place].n_tokens + 1 for place in again}
        results.update(zip(again, write([*again.values()]), strict=True))
    found = [results[place] for place in range(len(prompts))]
    written = [one.ids if one.end_id is None else [*one.ids, one.end_id] for one in found]
    replies = [
        Reply(one.text, one.finish_reason == "stop", n_before[place] + len(written[place]))
        for place, one in enumerate(found)
    ]
    if params.logprobs is None:
        return replies
    ends = [[] if one.end_id is None else [one.end_logprob] for one in found]
    own = [math.fsum([token.logprob for token in one.logprobs] + end) for one, end in zip(found, ends, strict=True)]
    theirs = [] if start is None else score_ids(start, list(zip(prompts, written, strict=True)))
    return [
        replace(reply, logprob=one, start_logprob=other and other.logprob)
        for reply, one, other in itertools.zip_longest(replies, own, theirs)
    ]


def _texts(model: Transformer, tokenizer: Tokenizer, items: Sequence[Item], *, is_short: bool) -> list[Record]:
    """Bits and bytes of every window; of few texts with few windows, of every token."""
    found: dict[int, list[np.ndarray]] = defaultdict(list)
    for place, amounts in score_windows(model, (item.target for item in items), tokenizer):
        found[place].append(amounts)
    records = []
    for place in range(len(items)):
        windows = found[place]
        parts = windows if is_short and len(windows) < FEWEST_UNITS else [one.sum(1, keepdims=True) for one in windows]
        n_tokens = sum(one.shape[1] for one in windows)
        records.append({name: [part[row].tolist() for part in parts] for row, name in enumerate(("bits", "bytes"))}
                       | {"tokens": n_tokens})  # fmt: skip
    return records


# Figures ------------------------------------------------------------------------------------------------------------

LENGTHS = ("characters", "bytes", "tokens")
PASS_AT = (1, 2, 5, 10, 50, 100)
FIGURES: dict[Kind, tuple[str, ...]] = {
    "choice": ("accuracy", *(f"accuracy_{unit}" for unit in (*LENGTHS, "pmi", "centered")),
               "brier", "calibration_error", "perplexity"),
    "generation": ("exact_match", "exact_match_flexible", "f1", *ROUGE),
    "code": tuple(f"pass@{k}" for k in PASS_AT),
    "text": ("bits_per_byte", "perplexity"),
}  # fmt: skip
"""Names of all figures that a benchmark of a kind may have."""


def figures_of(records: Sequence[Record]) -> dict[str, Estimate]:
    """Every figure that the records of one benchmark give. Raises DataError: there is no record."""
    if not records:
        raise DataError("there is no item to score.", "Raise --limit, or look into the benchmark's file.")
    first = records[0]
    if "gold" in first:
        return _choice_figures(records)
    if "passed" in first:
        passed = [record["passed"] for record in records]
        if len(passed[0]) == 1:
            return {"pass@1": share([one for (one,) in passed])}
        ks = [k for k in PASS_AT if k <= len(passed[0])]
        return {f"pass@{k}": mean([pass_at_k(len(one), sum(one), k) for one in passed], "problems") for k in ks}
    if "outcomes" in first:
        values: dict[str, list[Any]] = defaultdict(list)
        for record in records:
            for name, value in record["outcomes"].items():
                values[name].append(value)
        return {name: _outcome(own) for name, own in values.items()}
    windows = [
        (place, np.array(window))
        for place, record in enumerate(records)
        for window in zip(record["bits"], record["bytes"], strict=True)
    ]
    bits, n_bytes = text_units(windows)
    per_byte = ratio_estimate(bits, n_bytes)
    bits_per_token = float(bits.sum()) / sum(record["tokens"] for record in records)
    spread = per_byte.stderr / per_byte.value * bits_per_token * math.log(2) * 2**bits_per_token
    perplexity = Estimate(2**bits_per_token, spread, sum(record["tokens"] for record in records), "tokens")
    return {"bits_per_byte": per_byte, "perplexity": perplexity}


def _outcome(values: Sequence[Any]) -> Estimate:
    if isinstance(values[0], bool):
        return share(values)
    if isinstance(values[0], list | tuple):
        return replace(ratio_estimate(*np.array(values).T), unit="tokens")
    return mean(values, "answers")


def _choice_figures(records: Sequence[Record]) -> dict[str, Estimate]:
    if len(records[0]["logprob"]) == 1:
        losses = np.array([-record["logprob"][0] for record in records])
        level = mean(losses, "items")
        perplexity = math.exp(level.value)
        return {
            "accuracy": share([record["greedy"][0] for record in records]),
            "perplexity": Estimate(perplexity, perplexity * level.stderr, len(records), "items"),
        }
    units = ("", *LENGTHS, *(("pmi",) if "unconditional" in records[0] else ()))
    found = {
        f"accuracy_{unit}".rstrip("_"): share([_best(record, unit) == record["gold"] for record in records])
        for unit in units
    }
    # As DCLM has it, whose harness chooses by the mean of the tokens.
    chance, own = float(np.mean([record["chance"] for record in records])), found["accuracy_tokens"]
    found["accuracy_centered"] = Estimate(
        (own.value - chance) / (1 - chance), own.stderr / (1 - chance), own.n, own.unit
    )
    squares = [(_softmax(one["logprob"]) - np.eye(len(one["logprob"]))[one["gold"]]) ** 2 for one in records]
    found["brier"] = mean([float(one.sum()) for one in squares], "items")
    confidence, is_right = confidences(records)
    rng, n = np.random.default_rng(0), len(records)
    drawn = (rng.integers(0, n, n) for _ in range(_RESAMPLES))
    resampled = [calibration_error(confidence[places], is_right[places]) for places in drawn]
    error, spread = calibration_error(confidence, is_right), float(np.std(resampled))
    return found | {"calibration_error": Estimate(error, spread, n, "items")}


def confidences(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """The probability of the likeliest choice of each item, and whether it is the right one."""
    probabilities = [_softmax(record["logprob"]) for record in records]
    is_right = [int(p.argmax()) == record["gold"] for p, record in zip(probabilities, records, strict=True)]
    return np.array([p.max() for p in probabilities]), np.array(is_right)


def _best(record: Record, unit: str = "") -> int:
    """The choice with the highest log-likelihood: plain, per unit of length, or beyond that without the question."""
    score = np.array(record["logprob"])
    if unit == "pmi":
        score = score - np.array(record["unconditional"])
    elif unit:
        score = score / np.maximum(1, np.array(record[unit]))
    return int(score.argmax())


def _softmax(logprobs: Sequence[float]) -> np.ndarray:
    weights = np.exp(np.array(logprobs) - max(logprobs))
    return np.asarray(weights / weights.sum())


def calibration_error(confidence: np.ndarray, is_right: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): over ten equal bins, |accuracy − confidence|, weighted."""
    return sum(abs(right - sure) * n for _, sure, right, n in reliability(confidence, is_right)) / len(confidence)


def reliability(confidence: np.ndarray, is_right: np.ndarray) -> list[tuple[float, float, float, int]]:
    """(lower edge, mean confidence, accuracy, n) of each bin that holds an item: the points of a reliability plot."""
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    return [
        (place / _BINS, float(confidence[inside].mean()), float(is_right[inside].mean()), int(inside.sum()))
        for place in range(_BINS)
        if (inside := bins == place).any()
    ]


def pass_at_k(n: int, n_passed: int, k: int) -> float:
    """The chance that one of k samples passes, unbiased: 1 − C(n − c, k) / C(n, k) (Chen et al. 2021)."""
    return 1.0 - math.comb(n - n_passed, k) / math.comb(n, k)


def by_group(records: Sequence[Record]) -> dict[str, dict[str, Estimate]]:
    """The figures of each part, where a task has parts."""
    parts: Mapping[str, list[Record]] = defaultdict(list)
    for record in records:
        parts[record["group"]].append(record)
    return {group: figures_of(part) for group, part in parts.items() if group}


# Kept records -------------------------------------------------------------------------------------------------------


def read_records(path: Path, identity: str) -> list[Record]:
    """The records that `measure` kept under an identity. Raises ArtifactError: none there."""
    if not (found := kept_records(path, identity)):
        raise ArtifactError(f"{path}: holds no records of these scores.", "Write them again: groundup evaluate …")
    return list(found.values())


def item_scores(records: Sequence[Record]) -> dict[int, float]:
    """One score for each item, by its number, the higher the better: what two models are compared by."""
    return {record["item"]: _item_score(record) for record in records}


def _item_score(record: Record) -> float:
    if "gold" in record:
        is_single = len(record["logprob"]) == 1
        return float(record["greedy"][0] if is_single else _best(record) == record["gold"])
    if "passed" in record:
        return float(np.mean(record["passed"]))
    if "outcomes" in record:
        return float(next(iter(record["outcomes"].values())))
    bits, n_bytes = (sum(map(sum, record[name])) for name in ("bits", "bytes"))
    return -bits / max(1, n_bytes)


def kept_records(path: Path | None, identity: str) -> dict[int, Record]:
    """Records that stand in a file under this identity, by item; a last line that is cut off does not count."""
    if path is None or not path.is_file():
        return {}
    found: dict[int, Record] = {}
    for place, line in enumerate(path.read_bytes().splitlines()):
        try:
            record = json.loads(line)
            if place == 0 and record != {"identity": identity}:
                return {}
            if place:
                found[record["item"]] = record
        except (ValueError, KeyError, TypeError):
            break
    return found


def to_plain(figures: Mapping[str, Estimate]) -> dict[str, Any]:
    """Figures as plain values."""
    return {name: asdict(figure) for name, figure in figures.items()}
