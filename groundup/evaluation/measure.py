"""One benchmark, one model: what the model made of every item, and the figures with error bars that follow from it.

What was found of an item is a line of a file as soon as its batch is done, under a fingerprint of model, items and
decoding; the same command goes on from there. Figures are functions of these lines alone, so that two models can be
compared item by item, and the figures recomputed without a model.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from groundup.errors import ArtifactError, DataError
from groundup.evaluation.benchmarks import Benchmark, Item, extract_answer, render_program
from groundup.evaluation.likelihood import log_likelihoods
from groundup.evaluation.metrics import Estimate, bits_and_bytes, mean, ratio_estimate, share
from groundup.evaluation.sandbox import Limits, run_program
from groundup.files import write_text
from groundup.generation import SamplingParams, generate_batch
from groundup.model import Transformer
from groundup.tokenizer import Tokenizer

Record = dict[str, Any]
_CHUNK = 256  # items between two writes
_BINS = 10  # of the expected calibration error
_RESAMPLES = 1000


@dataclass(frozen=True)
class Decoding:
    """How answers are written.

    Attributes:
        samples: programs for each problem; several are drawn, for pass@k.
        temperature: of drawing; one sample is greedy.
        seed: of the draws.
        program: limits of what is run.
        allow_unisolated: run programs without namespaces; see `run_program`.
    """

    samples: int = 1
    temperature: float = 0.8
    seed: int = 1
    program: Limits = field(default_factory=Limits)
    allow_unisolated: bool = False


GREEDY = Decoding()


def measure(
    model: Transformer,
    tokenizer: Tokenizer,
    benchmark: Benchmark,
    items: Sequence[Item],
    *,
    decoding: Decoding = GREEDY,
    kept: Path | None = None,
    identity: str = "",
    advance: Callable[[int], None] | None = None,
) -> list[Record]:
    """Put every item to a model.

    Args:
        model: put into evaluation mode.
        tokenizer: of the model.
        benchmark: of the items.
        items: what `read_items` gave.
        decoding: of generations and code.
        kept: file of the records; those that stand there under the same identity are not made again.
        identity: what stands for model, tokenizer, items and decoding.
        advance: is told how many items more are done.

    Returns:
        One record an item, in their order. A choice: "logprob", "tokens" and "bytes" of each choice, "characters",
        "unconditional" where the description has such a context, "greedy", "gold". A generation: "answer", "target",
        "reply", "strict", "flexible", "f1". Code: "passed" and "reasons" of each sample. A text: "bits" and "bytes" of
        its parts.
    """
    done = _read_kept(kept, identity)
    waiting = [item for item in items if item.number not in done]
    if advance is not None and done:
        advance(len(items) - len(waiting))
    work = {"choice": _choices, "generation": _generations, "code": _programs, "text": _texts}[benchmark.kind]
    for first in range(0, len(waiting), _CHUNK):
        chunk = waiting[first : first + _CHUNK]
        found = work(model, tokenizer, benchmark, chunk, decoding)
        for item, record in zip(chunk, found, strict=True):
            done[item.number] = {"item": item.number, "group": item.group, **record}
        if kept is not None:
            lines = [json.dumps(record, ensure_ascii=False) for record in ({"identity": identity}, *done.values())]
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, "\n".join([*lines, ""]))
        if advance is not None:
            advance(len(chunk))
    return [done[item.number] for item in items]


def _choices(
    model: Transformer, tokenizer: Tokenizer, benchmark: Benchmark, items: Sequence[Item], _: Decoding
) -> list[Record]:
    pairs = [pair for item in items for pair in item.pairs]
    before = benchmark.unconditional
    free = list(dict.fromkeys((before, choice) for item in items for choice in item.choices)) if before else []
    scored = log_likelihoods(model, tokenizer, pairs + free)
    told, without = iter(scored), dict(zip(free, scored[len(pairs) :], strict=True))
    records = []
    for item in items:
        own = [next(told) for _ in item.choices]
        texts = [choice.removeprefix(benchmark.delimiter) for choice in item.choices]
        record: Record = {
            "gold": item.gold,
            "logprob": [one.logprob for one in own],
            "tokens": [one.n_tokens for one in own],
            "characters": [len(text) for text in texts],
            "bytes": [len(text.encode()) for text in texts],
            "greedy": [one.is_greedy for one in own],
        }
        if before:
            record["unconditional"] = [without[before, choice].logprob for choice in item.choices]
        records.append(record)
    return records


def _replies(
    model: Transformer, tokenizer: Tokenizer, benchmark: Benchmark, items: Sequence[Item], decoding: Decoding
) -> Iterator[list[str]]:
    prompts = [tokenizer.encode(item.context) or [tokenizer.end_of_text_id] for item in items]
    params = SamplingParams(
        temperature=decoding.temperature if decoding.samples > 1 else 0.0,
        max_tokens=min(benchmark.max_tokens, model.config.context_length - 1),
        stop=benchmark.stop,
    )
    repeated = [prompt for prompt in prompts for _ in range(decoding.samples)]
    seeds = [
        decoding.seed * 1_000_003 + item.number * decoding.samples + k
        for item in items
        for k in range(decoding.samples)
    ]
    results = iter(generate_batch(model, tokenizer, repeated, params, seeds=seeds))
    for _ in items:
        yield [next(results).text for _ in range(decoding.samples)]


def _generations(
    model: Transformer, tokenizer: Tokenizer, benchmark: Benchmark, items: Sequence[Item], decoding: Decoding
) -> list[Record]:
    records = []
    greedily = replace(decoding, samples=1)
    for item, (reply,) in zip(items, _replies(model, tokenizer, benchmark, items, greedily), strict=True):
        # A target without the pattern is the answer itself; a reply without it is no answer.
        target = extract_answer(benchmark, item.target, is_flexible=True) or item.target.strip()
        answer = extract_answer(benchmark, reply, is_flexible=True)
        records.append(
            {
                "reply": reply,
                "target": target,
                "answer": answer,
                "strict": extract_answer(benchmark, reply, is_flexible=False) == target,
                "flexible": answer == target,
                "f1": f1(answer, target),
            }
        )
    return records


def _programs(
    model: Transformer, tokenizer: Tokenizer, benchmark: Benchmark, items: Sequence[Item], decoding: Decoding
) -> list[Record]:
    written = list(_replies(model, tokenizer, benchmark, items, decoding))
    programs = [render_program(benchmark, item, reply) for item, replies in zip(items, written, strict=True)
                for reply in replies]  # fmt: skip
    run = partial(run_program, limits=decoding.program, allow_unisolated=decoding.allow_unisolated)
    with ThreadPoolExecutor(2) as pool:
        outcomes = iter(list(pool.map(run, programs)))
    records = []
    for replies in written:
        own = [next(outcomes) for _ in replies]
        passed = [one.passed for one in own]
        records.append({"reply": replies[0], "passed": passed, "reasons": [one.reason for one in own]})
    return records


def _texts(
    model: Transformer, tokenizer: Tokenizer, benchmark: Benchmark, items: Sequence[Item], _: Decoding
) -> list[Record]:
    records = []
    for item in items:
        bits, n_bytes = bits_and_bytes(model, [item.target], tokenizer)
        n_tokens = len(tokenizer.encode(item.target))
        records.append({"bits": bits.tolist(), "bytes": n_bytes.tolist(), "tokens": n_tokens})
    return records


# Figures ------------------------------------------------------------------------------------------------------------


def figures_of(records: Sequence[Record]) -> dict[str, Estimate]:
    """Every figure that the records of one benchmark give.

    Raises:
        DataError: there is no record.
    """
    if not records:
        raise DataError("there is no item to score.", "Raise --limit, or look into the benchmark's file.")
    first = records[0]
    if "gold" in first:
        return _choice_figures(records)
    if "passed" in first:
        ks = [k for k in (1, 2, 5, 10, 50, 100) if k <= len(first["passed"])]
        if ks == [1]:
            return {"pass@1": share([record["passed"][0] for record in records])}
        return {
            f"pass@{k}": mean([pass_at_k(len(r["passed"]), sum(r["passed"]), k) for r in records], "problems")
            for k in ks
        }
    if "strict" in first:
        return {
            "exact_match": share([record["strict"] for record in records]),
            "exact_match_flexible": share([record["flexible"] for record in records]),
            "f1": mean([record["f1"] for record in records], "items"),
        }
    bits, n_bytes = (np.array([value for r in records for value in r[key]]) for key in ("bits", "bytes"))
    per_byte = ratio_estimate(bits, n_bytes)
    bits_per_token = float(bits.sum()) / sum(record["tokens"] for record in records)
    spread = per_byte.stderr / per_byte.value * bits_per_token * math.log(2) * 2**bits_per_token
    perplexity = Estimate(2**bits_per_token, spread, sum(record["tokens"] for record in records), "tokens")
    return {"bits_per_byte": per_byte, "perplexity": perplexity}


def _choice_figures(records: Sequence[Record]) -> dict[str, Estimate]:
    if len(records[0]["logprob"]) == 1:
        losses = np.array([-record["logprob"][0] for record in records])
        level = mean(losses, "items")
        perplexity = math.exp(level.value)
        return {
            "accuracy": share([record["greedy"][0] for record in records]),
            "perplexity": Estimate(perplexity, perplexity * level.stderr, len(records), "items"),
        }
    found = {
        "accuracy": share([_best(record) == record["gold"] for record in records]),
        **{
            f"accuracy_{unit}": share([_best(record, unit) == record["gold"] for record in records])
            for unit in ("characters", "bytes", "tokens")
        },
    }
    if "unconditional" in records[0]:
        found["accuracy_pmi"] = share([_best(record, "pmi") == record["gold"] for record in records])
    chance = float(np.mean([1 / len(record["logprob"]) for record in records]))
    plain = found["accuracy"]
    found["accuracy_centered"] = Estimate(
        (plain.value - chance) / (1 - chance), plain.stderr / (1 - chance), plain.n, plain.unit
    )
    probabilities = [_softmax(record["logprob"]) for record in records]
    found["brier"] = mean(
        [
            float(((p - np.eye(len(p))[record["gold"]]) ** 2).sum())
            for p, record in zip(probabilities, records, strict=True)
        ],
        "items",
    )
    confidence = np.array([p.max() for p in probabilities])
    is_right = np.array([int(p.argmax()) == record["gold"] for p, record in zip(probabilities, records, strict=True)])
    found["calibration_error"] = bootstrap(
        lambda places: calibration_error(confidence[places], is_right[places]), len(records)
    )
    return found


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


def f1(answer: str, target: str) -> float:
    """F1 of words without articles, punctuation and case (SQuAD, Rajpurkar et al. 2016)."""
    said, wanted = (_words(text) for text in (answer, target))
    n_common = sum((Counter(said) & Counter(wanted)).values())
    if not said or not wanted:
        return float(said == wanted)
    return 2 * n_common / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, unit: str = "items") -> Estimate:
    """A statistic of n items, with the standard deviation over 1,000 resamples for its standard error."""
    rng = np.random.default_rng(0)
    resampled = [statistic(rng.integers(0, n, n)) for _ in range(_RESAMPLES)]
    return Estimate(statistic(np.arange(n)), float(np.std(resampled)), n, unit)


def by_group(records: Sequence[Record]) -> dict[str, dict[str, Estimate]]:
    """The figures of each part, where a benchmark has parts."""
    parts: Mapping[str, list[Record]] = defaultdict(list)
    for record in records:
        parts[record["group"]].append(record)
    return {group: figures_of(part) for group, part in parts.items()} if len(parts) > 1 else {}


# Kept records -------------------------------------------------------------------------------------------------------


def read_records(path: Path, identity: str) -> list[Record]:
    """The records that `measure` kept under an identity. Raises ArtifactError: none there."""
    if not (found := _read_kept(path, identity)):
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
    return float(record["flexible"]) if "strict" in record else -sum(record["bits"]) / sum(record["bytes"])


def _read_kept(path: Path | None, identity: str) -> dict[int, Record]:
    """Records that stand in a file under this identity; a last line that is cut off does not count."""
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
