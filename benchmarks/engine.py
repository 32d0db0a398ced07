"""Tokens a second of the engine: beside `transformers.generate`, beside itself without batches, and what adds up to it.

Same weights, same settings, same threads; all that is compared takes turns in one run, prompts included in the time.

    beside transformers   one text, batches of 8, and rollouts: 64 sampled texts
    mixed requests        16 that differ in prompt, length and sampling, together and one after the other
    repeated prefix       time to the first token of a prompt whose first 512 tokens were read before
    cold start            `groundup generate` to its first token, less what `import torch` takes
    ladder                of the demo's model: one change a row, from a plain loop to 64 texts at once

Weights are random: speed does not depend on them (but the demo's of the cold start are trained, a little). With one
thread the process's CPU time is taken, which other programs disturb least; otherwise wall time. A ratio is the median
of the rounds' ratios.

Examples:
    python benchmarks/engine.py
    python benchmarks/engine.py --threads 1 --only rollouts ladder
    python benchmarks/engine.py --quick
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import decode
import torch
from decode import models_of, transformers_model
from record import spread, write_result

from groundup.generation import Engine, KVCache, Request, SamplingParams
from groundup.generation.native import NativeStep
from groundup.generation.step import ModelStep, Row
from groundup.model import ModelConfig, preset

CACHE = Path(__file__).resolve().parent / ".cache"
SHAPES: dict[str, Callable[[], ModelConfig]] = {
    **decode.SHAPES,
    "demo": lambda: preset("ground-1m", context_length=1024),
    "14M": lambda: preset(
        "ground-1m", context_length=1024, vocab_size=8192, n_layers=6, n_heads=6, n_kv_heads=6, head_dim=64,
        d_model=384, d_ff=1024,
    ),
}  # fmt: skip

# What is compared with transformers: texts at once, temperature, new tokens, and for each shape and precision of ours
# the precision of theirs and the ratio that is wanted.
ONE: dict[str, dict[str, tuple[str, float | None]]] = {
    "demo": {"f32": ("f32", None), "bf16": ("f32", None), "int8": ("f32", None)},
    "26M": {"f32": ("f32", 3.0), "bf16": ("f32", 5.0), "int8": ("f32", 7.0)},
    "125M": {"f32": ("f32", 3.7), "bf16": ("f32", 6.0), "int8": ("f32", 8.5)},
}
EIGHT: dict[str, dict[str, tuple[str, float | None]]] = {
    "demo": {"bf16": ("bf16", None)}, "26M": {"bf16": ("bf16", 1.5)}, "125M": {"bf16": ("bf16", 1.5)}
}  # fmt: skip
ROLLOUTS: dict[str, dict[str, tuple[str, float | None]]] = {
    shape: {"f32": ("f32", 3.0), "bf16": ("bf16", 3.0)} for shape in ("demo", "14M")
}

PROMPT = 16
PREFIX, TAIL = 512, 16

Rate = Callable[[int], float]
"""Of a round's number: tokens a second, or seconds."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts; nothing is recorded then")
    parser.add_argument("--quick", action="store_true", help="two rounds, the demo's model only; nothing is recorded")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 2
    torch.set_num_threads(arguments.threads)
    setting = Setting(arguments.threads, arguments.rounds, arguments.quick)
    found = {name: PARTS[name](setting) for name in arguments.only}
    if not arguments.quick and arguments.only == list(PARTS):
        packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        write_result("engine", {"threads": arguments.threads, "rounds": arguments.rounds, **packages, "parts": found})


class Setting:
    """How things are measured.

    Args:
        threads: of this process and of those that it starts.
        rounds: times that each thing is measured, after one that warms up.
        is_quick: the smallest form.
    """

    def __init__(self, threads: int, rounds: int, is_quick: bool) -> None:
        self.threads, self.rounds, self.is_quick = threads, rounds, is_quick
        self.n_new = 32 if is_quick else 128
        self.clock = time.process_time if threads == 1 else time.perf_counter

    def seconds(self, work: Callable[[], object]) -> float:
        """What a call takes."""
        begin = self.clock()
        work()
        return self.clock() - begin

    def take_turns(self, variants: dict[str, Rate]) -> dict[str, list[float]]:
        """Each variant once a round."""
        found: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(self.rounds + 1):  # the first one warms up
            for name, variant in variants.items():
                value = variant(number)
                if number:
                    found[name].append(value)
        return found

    def shapes(self, names: Iterable[str]) -> list[str]:
        """Those of them that are measured."""
        return [name for name in names if name == "demo" or not self.is_quick]


def row_of(
    what: str, values: dict[str, list[float]], name: str, beside: str, wanted: float | None, **facts: Any
) -> dict[str, Any]:
    """One comparison, printed; `wanted` is the least ratio, or below 1 the most."""
    ratios = [ours / theirs for ours, theirs in zip(values[name], values[beside], strict=True)]
    row = {
        "what": what, "name": name, "value": spread(values[name]), "beside": beside,
        "beside_value": spread(values[beside]), "ratio": spread(ratios), "wanted": wanted, **facts,
    }  # fmt: skip
    shown = "" if wanted is None else f"  (wanted: {'≤' if wanted < 0.9 else '≥'} {wanted:g})"
    said = "".join(f"  {key} {value:.2f}" for key, value in facts.items())
    print(
        f"{what} | {name}: {row['value']['median']:,.4g} | {beside}: {row['beside_value']['median']:,.4g} "
        f"| {statistics.median(ratios):.2f}×{shown}{said}", flush=True,
    )  # fmt: skip
    return row


# Requests.


def prompts_of(number: int, n: int, length: int, vocab_size: int) -> torch.Tensor:
    """Tokens (n, length) of their own for each round, so that no prefix is known."""
    return torch.randint(vocab_size, (n, length), generator=torch.Generator().manual_seed(number))


def engine_rate(setting: Setting, engine: Engine, n: int, temperature: float) -> Rate:
    """Tokens a second of n texts."""

    def rate(number: int) -> float:
        prompts = prompts_of(number, n, PROMPT, engine.config.vocab_size).tolist()
        params = SamplingParams(temperature, max_tokens=setting.n_new)
        requests = [Request(ids, params, seed=seed) for seed, ids in enumerate(prompts)]
        return n * setting.n_new / setting.seconds(lambda: engine.run(requests))

    return rate


def transformers_rate(setting: Setting, model: Any, n: int, temperature: float) -> Rate:
    """The same by `generate`."""
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    def rate(number: int) -> float:
        ids = prompts_of(number, n, PROMPT, model.config.vocab_size)
        mask = torch.ones_like(ids)
        return n * setting.n_new / setting.seconds(
            lambda: model.generate(ids, attention_mask=mask, max_new_tokens=setting.n_new, **drawn)
        )  # fmt: skip

    return rate


# The parts.


def beside_transformers(
    setting: Setting, wanted: dict[str, dict[str, tuple[str, float | None]]], n: int, temperature: float
) -> list[dict[str, Any]]:
    """n texts at once by the engine and by `transformers.generate`, tokens a second."""
    rows = []
    for shape in setting.shapes(wanted):
        models = models_of(SHAPES[shape]())
        variants = {
            f"transformers {kind}": transformers_rate(setting, transformers_model(models["f32"], kind), n, temperature)
            for kind in sorted({theirs for theirs, _ in wanted[shape].values()})
        }
        for kind in wanted[shape]:
            engine = Engine(models[kind], slots=n, length=PROMPT + setting.n_new)
            variants[f"engine {kind}"] = engine_rate(setting, engine, n, temperature)
        values = setting.take_turns(variants)
        what = f"{shape}, {'one text' if n == 1 else f'{n} texts'}, {'sampled' if temperature else 'greedy'}"
        for kind, (theirs, least) in wanted[shape].items():
            rows.append(row_of(what, values, f"engine {kind}", f"transformers {theirs}", least))
    return rows


def mixed_requests(setting: Setting) -> list[dict[str, Any]]:
    """16 requests that differ, together and one after the other, tokens a second."""
    rows = []
    for shape in setting.shapes(("demo", "14M", "26M")):
        models = models_of(SHAPES[shape]())
        for kind in ("f32", "bf16"):
            engine = Engine(models[kind], slots=16, length=256)
            values = setting.take_turns(
                {
                    "one after the other": partial(mixed_rate, setting, engine, False),
                    "together": partial(mixed_rate, setting, engine, True),
                }
            )
            rows.append(row_of(f"{shape} {kind}, 16 mixed requests", values, "together", "one after the other", 3.0))
    return rows


def mixed_rate(setting: Setting, engine: Engine, together: bool, number: int) -> float:
    """Tokens a second of one order of work."""
    ids = prompts_of(2 * number + together, 16, 96, engine.config.vocab_size).tolist()
    kinds: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.95}, {"temperature": 1, "top_k": 40},
        {"temperature": 0.7, "repetition_penalty": 1.1}, {"temperature": 1, "min_p": 0.05},
    ]  # fmt: skip
    requests = [
        Request(ids[place][: 16 + 5 * place], SamplingParams(max_tokens=32 + 6 * place, **kinds[place % 6]), seed=place)
        for place in range(16)
    ]
    batches: Sequence[list[Request]] = [requests] if together else [[request] for request in requests]
    seconds = setting.seconds(lambda: [engine.run(batch) for batch in batches])
    return sum(request.results[0].n_tokens for request in requests) / seconds


def repeated_prefix(setting: Setting) -> list[dict[str, Any]]:
    """Seconds to the first token of a prompt, and of another with the same first 512 tokens."""
    rows = []
    for shape in setting.shapes(("demo", "14M", "26M")):
        models = models_of(SHAPES[shape]())
        for pages in (False, True):
            engine = Engine(models["f32"], slots=4, length=PREFIX + TAIL + 1, pages=pages)

            def first_token(number: int, tail: int, engine: Engine = engine) -> float:
                prefix = prompts_of(number, 1, PREFIX, engine.config.vocab_size)[0].tolist()
                request = Request([*prefix, *[tail] * TAIL], SamplingParams(0, max_tokens=1))
                return setting.seconds(lambda: engine.run([request]))

            values = setting.take_turns(
                {"fresh": partial(first_token, tail=1), "repeated": partial(first_token, tail=2)}
            )
            what = f"{shape}, {'pages' if pages else 'slots'}, seconds to the first token behind {PREFIX + TAIL}"
            rows.append(row_of(what, values, "repeated", "fresh", 0.2))
    return rows


def cold_start(setting: Setting) -> list[dict[str, Any]]:
    """Seconds of `groundup generate` to its first token, and of `import torch`, each a process of its own."""
    run = CACHE / "engine" / "demo"
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "CI": "true"}
    groundup = [sys.executable, "-m", "groundup"]
    build = ["build", "demo", "--only", "pretrain", "--set", "pretrain.tokens=8192", "--out", str(run), "--quiet"]
    subprocess.run([*groundup, *build], check=True, env=environment)

    def seconds(command: list[str], number: int) -> float:
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begin
        return wall if setting.threads > 1 else after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    variants: dict[str, Rate] = {
        "import torch": partial(seconds, [sys.executable, "-c", "import torch"]),
        "groundup generate": partial(seconds, [*groundup, "generate", str(run), "Once upon a time", "-n", "1"]),
    }
    values = setting.take_turns(variants)
    values["more than torch"] = [a - b for a, b in zip(*(values[name] for name in reversed(variants)), strict=True)]
    most = statistics.median(values["more than torch"])
    print(f"cold start: {most:.2f} s more than import torch (wanted: ≤ 1)", flush=True)
    return [{"name": name, "value": spread(times)} for name, times in values.items()]


def ladder(setting: Setting) -> list[dict[str, Any]]:
    """Tokens a second of the demo's model, greedy, one change a row."""
    models = models_of(decode.SHAPES["demo"]())
    model = models["f32"]
    config = model.config
    cache = KVCache(config, 1, PROMPT + setting.n_new)
    eager, native = ModelStep(model, cache, is_native=False), NativeStep(model, cache)

    def plain_loop(step: Callable[[list[int], int], torch.Tensor]) -> Rate:
        """A loop around a step that is told a text and how much of it the cache holds."""

        def rate(number: int) -> float:
            ids = prompts_of(number, 1, PROMPT, config.vocab_size)[0].tolist()

            def write() -> None:
                n_stored = 0
                for _ in range(setting.n_new):
                    token = int(step(ids, n_stored).argmax())
                    n_stored = len(ids)
                    ids.append(token)

            return setting.n_new / setting.seconds(torch.inference_mode()(write))

        return rate

    def in_c(ids: list[int], n_stored: int) -> torch.Tensor:
        new = len(ids) - n_stored
        return native(ids[n_stored:], [0] * new, range(n_stored, len(ids)), [new - 1])

    variants: dict[str, Rate] = {
        "forward pass over the whole text": plain_loop(lambda ids, _: model(torch.tensor([ids]))[0, -1]),
        "transformers.generate": transformers_rate(setting, transformers_model(model, "f32"), 1, 0),
        "forward pass over the newest token, keys and values cached": plain_loop(
            lambda ids, n_stored: eager([Row(0, ids[n_stored:], n_stored)])
        ),
        "the step in C": plain_loop(in_c),
    }
    for n in (1, 8, 64):
        engine = Engine(model, slots=n, length=PROMPT + setting.n_new)
        variants[f"the engine, {n} {'text' if n == 1 else 'texts'}"] = engine_rate(setting, engine, n, 0)
    half = Engine(models["bf16"], slots=64, length=PROMPT + setting.n_new)
    variants["the engine, 64 texts, bfloat16"] = engine_rate(setting, half, 64, 0)
    values = setting.take_turns(variants)
    names = list(values)
    return [row_of("demo, tokens a second", values, name, names[0], None) for name in names]


PARTS: dict[str, Callable[[Setting], list[dict[str, Any]]]] = {
    "one": lambda setting: beside_transformers(setting, ONE, 1, 0),
    "eight": lambda setting: beside_transformers(setting, EIGHT, 8, 0),
    "rollouts": lambda setting: beside_transformers(setting, ROLLOUTS, 64, 1),
    "mixed": mixed_requests,
    "prefix": repeated_prefix,
    "cold": cold_start,
    "ladder": ladder,
}

if __name__ == "__main__":
    main()
