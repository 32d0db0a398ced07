"""Milliseconds a token: `transformers.generate`, llama.cpp and ours; same weights and threads, interleaved in one run.

Two Llama shapes of 26 and 125 million parameters (32,000 tokens; the larger one has grouped queries and an output layer
of its own) and the demo's model. Weights are random: speed does not depend on them. Measured: a step of one token, of
one token in each of eight texts, and of several tokens of one text (what verifying a draft costs), each over 64 tokens
that stand in the cache; and reading a prompt of 512 tokens (the demo's: 255) to its first new one. transformers and our
engine are timed by what 32 more tokens of a greedy text take, the others by the step alone.

With one thread the process's CPU time is taken, which other programs disturb least; otherwise wall time. "of bandwidth"
is bytes of weights a token / time / the best bandwidth at which a loop in C reads 512 MiB, measured in every round.
llama.cpp needs an environment of its own (`make test-interop` builds it); without one its rows are left out.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib.metadata
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import spread, write_result
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from groundup.generation import Engine, Request, SamplingParams
from groundup.generation.cache import KVCache
from groundup.generation.native import NativeStep, why_not
from groundup.generation.quantize import Quantization, quantize
from groundup.interop.gguf import export_gguf
from groundup.model import ModelConfig, Transformer, preset

HERE = Path(__file__).resolve().parent
LLAMA_CPP = HERE / ".cache" / "llama_cpp" / "bin" / "python"
WORKER = HERE / "baselines" / "llama_cpp_speed.py"
CONTEXT, N_NEW, PROMPT = 64, 32, 512
ROWS = 8
VERIFIED = (1, 2, 3, 4, 5, 8, 9, 16)
LLAMA = {"vocab_size": 32000, "context_length": 1024, "head_dim": 64, "norm_eps": 1e-5, "qk_norm": False}
SHAPES: dict[str, Callable[[], ModelConfig]] = {
    "demo": lambda: preset("ground-1m"),
    "26M": lambda: preset(
        "llama-160m", **LLAMA, n_layers=8, n_heads=6, n_kv_heads=6, d_model=384, d_ff=1024, tied_embeddings=True
    ),
    "125M": lambda: preset("llama-160m", **LLAMA, n_layers=12, n_heads=12, n_kv_heads=4, d_model=768, d_ff=2048),
}
GGUF = {"f32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}

Timer = Callable[[int, int], float]
"""Rows and tokens of a step to its seconds."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--python", type=Path, default=LLAMA_CPP, help="of an environment with llama-cpp-python")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two rounds, fewer steps of verification")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 2
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    results: dict[str, Any] = {"threads": arguments.threads, "clock": clock.__name__, "rounds": arguments.rounds}
    for package in ("torch", "transformers"):
        results[package] = importlib.metadata.version(package)
    worker = start_worker(arguments.python) if arguments.python.is_file() else None
    with tempfile.TemporaryDirectory() as name:
        read = make_reader(Path(name), arguments.threads)
        for shape in arguments.shapes:
            models = models_of(SHAPES[shape]())
            readers, timers = readers_of(models, clock), timers_of(models, clock)
            if worker is not None:
                timers |= llama_cpp_timers(models["f32"], Path(name) / shape, worker, arguments.threads)
            verified = (1, 5) if arguments.quick else VERIFIED
            results[shape] = measure(models, readers, timers, clock, read, arguments.rounds, verified)
            show(shape, results[shape])
    if worker is not None:
        results["llama_cpp_python"] = ask(worker, {"task": "version"})["version"]
        worker.terminate()
    if not arguments.quick:
        write_result(f"decode_{arguments.threads}_threads", results)


def models_of(config: ModelConfig) -> dict[str, Transformer]:
    """The same random weights in four precisions."""
    model = Transformer(config, seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    halved = copy.deepcopy(model).bfloat16()
    halved.compute_dtype = torch.bfloat16
    return {
        "f32": model,
        "bf16": halved,
        "int8": quantize(copy.deepcopy(model), Quantization(8)),
        "int4": quantize(copy.deepcopy(model), Quantization(4)),
    }


def bytes_read(model: Transformer) -> int:
    """Bytes of weights that a step reads: all but an embedding that is no output layer."""
    tensors = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    embedding = (*model.embed_tokens.parameters(), *model.embed_tokens.buffers()) if model.lm_head is not None else ()
    return sum(tensors.values()) - sum(tensor.nbytes for tensor in embedding)


def timers_of(models: dict[str, Transformer], clock: Callable[[], float]) -> dict[str, Timer]:
    """Ours and transformers'."""
    timers: dict[str, Timer] = {}
    for kind in ("f32", "bf16"):
        timers[f"transformers {kind}"] = generate_timer(transformers_model(models["f32"], kind), clock)
    for kind, model in models.items():
        engine = Engine(model, slots=ROWS, length=CONTEXT + N_NEW + 1)
        timers[f"engine {kind}"] = engine_timer(engine, clock)
        cache = KVCache(model.config, ROWS, CONTEXT + max(VERIFIED))
        assert why_not(model, cache) is None, why_not(model, cache)
        timers[f"step {kind}"] = step_timer(NativeStep(model, cache), clock)
    return timers


def readers_of(models: dict[str, Transformer], clock: Callable[[], float]) -> dict[str, Callable[[int], float]]:
    """Seconds in which transformers and our engine read a prompt, another in each round."""

    length = min(PROMPT, models["f32"].config.context_length - 1)

    def timed(read: Callable[[torch.Tensor], object], number: int) -> float:
        ids = torch.randint(500, (1, length), generator=torch.Generator().manual_seed(number))
        begin = clock()
        read(ids)
        return clock() - begin

    found: dict[str, Callable[[int], float]] = {}
    for kind in ("f32", "bf16"):
        theirs, engine = transformers_model(models["f32"], kind), Engine(models[kind], slots=1)
        generate = partial(theirs.generate, max_new_tokens=1, min_new_tokens=1, do_sample=False)

        def run(ids: torch.Tensor, engine: Engine = engine) -> object:
            return engine.run([Request(ids[0].tolist(), SamplingParams(temperature=0, max_tokens=1))])

        found[f"transformers {kind}"], found[f"engine {kind}"] = partial(timed, generate), partial(timed, run)
    return found


def step_timer(step: NativeStep, clock: Callable[[], float]) -> Timer:
    """Seconds of a step in C."""

    def seconds(rows: int, tokens: int) -> float:
        ids = [i % 500 for i in range(rows * tokens)]
        slots = [row for row in range(rows) for _ in range(tokens)]
        positions = [CONTEXT + i for _ in range(rows) for i in range(tokens)]
        begin = clock()
        for _ in range(steps_of(tokens)):
            step(ids, slots, positions)
        return (clock() - begin) / steps_of(tokens)

    return seconds


def steps_of(tokens: int) -> int:
    """Steps that are timed together."""
    return max(4, N_NEW // tokens)


def generate_timer(model: Any, clock: Callable[[], float]) -> Timer:
    """Seconds of a step of `transformers.generate`: what 32 more tokens take."""

    def seconds(rows: int, tokens: int) -> float:
        ids = torch.arange(rows * CONTEXT).view(rows, CONTEXT) % 500

        def generate(n_new: int) -> float:
            begin = clock()
            model.generate(ids, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False)
            return clock() - begin

        return (generate(N_NEW + 1) - generate(1)) / N_NEW

    return seconds


def engine_timer(engine: Engine, clock: Callable[[], float]) -> Timer:
    """Seconds of a step of our engine, greedy: what 32 more tokens take."""

    def seconds(rows: int, tokens: int) -> float:
        def generate(n_new: int) -> float:
            params = SamplingParams(temperature=0, max_tokens=n_new)
            requests = [Request([(row + i) % 500 for i in range(CONTEXT)], params) for row in range(rows)]
            begin = clock()
            engine.run(requests)
            return clock() - begin

        return (generate(N_NEW + 1) - generate(1)) / N_NEW

    return seconds


def transformers_model(model: Transformer, kind: str) -> Any:
    """The same weights in transformers' model."""
    config = model.config
    made, build = (Qwen3Config, Qwen3ForCausalLM) if config.qk_norm else (LlamaConfig, LlamaForCausalLM)
    theirs = build(
        made(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.context_length,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied_embeddings,
            eos_token_id=None,
        )
    ).eval()
    state = {
        name if name.startswith("lm_head") else f"model.{name}": value for name, value in model.state_dict().items()
    }
    theirs.load_state_dict(state, strict=False)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, model(ids), atol=1e-3)
    theirs.generation_config.pad_token_id = 0
    return theirs.to(torch.bfloat16) if kind == "bf16" else theirs


def start_worker(python: Path) -> subprocess.Popen[str]:
    """llama.cpp in its own environment."""
    return subprocess.Popen([str(python), str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(worker: subprocess.Popen[str], task: dict[str, Any]) -> dict[str, Any]:
    """One answer of the worker."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(json.dumps(task), file=worker.stdin, flush=True)
    found: dict[str, Any] = json.loads(worker.stdout.readline())
    return found


def llama_cpp_timers(model: Transformer, stem: Path, worker: subprocess.Popen[str], threads: int) -> dict[str, Timer]:
    """llama.cpp on the same weights."""
    timers: dict[str, Timer] = {}
    for kind, dtype in GGUF.items():
        file = f"{stem}-{dtype}.gguf"
        export_gguf(model, None, file, dtype=dtype)
        fixed = {"file": file, "threads": threads, "context": CONTEXT, "most_tokens": max(VERIFIED)}

        def seconds(rows: int, tokens: int, fixed=fixed) -> float:
            task = {**fixed, "rows": rows, "tokens": tokens, "steps": steps_of(tokens)}
            return float(ask(worker, task)["seconds"])

        timers[f"llama.cpp {kind}"] = seconds
    return timers


def measure(
    models: dict[str, Transformer],
    readers: dict[str, Callable[[int], float]],
    timers: dict[str, Timer],
    clock: Callable[[], float],
    read: Callable[[torch.Tensor], object],
    rounds: int,
    verified: tuple[int, ...],
) -> dict[str, Any]:
    """All figures of a shape, each round one of each."""
    found: dict[tuple[str, int, int], list[float]] = {}
    prompts: dict[str, list[float]] = {name: [] for name in readers}
    bandwidths = []
    buffer = torch.ones(1 << 27)
    for number in range(rounds + 1):  # the first one warms up
        begin = clock()
        read(buffer)
        bandwidths.append(buffer.nbytes / (clock() - begin))
        for name, reader in readers.items():
            seconds = reader(number)
            if number:
                prompts[name].append(seconds)
        for name, timer in timers.items():
            whole = name.startswith(("transformers", "engine"))
            for rows, tokens in [(1, 1), (ROWS, 1), *((1, n) for n in verified if n > 1 and not whole)]:
                seconds = timer(rows, tokens)
                if number:
                    found.setdefault((name, rows, tokens), []).append(seconds)
    best = max(bandwidths)
    figures: dict[str, Any] = {
        "bandwidth": spread(bandwidths),
        "bytes_read": {},
        "decode": {},
        "batch": {},
        "verify": {},
        "prompt": {name: {"seconds": spread(times)} for name, times in prompts.items()},
    }
    for name in timers:
        kind = name.split()[-1]
        figures["bytes_read"][kind] = bytes_read(models[kind])
        one = found[name, 1, 1]
        figures["decode"][name] = {
            "seconds": spread(one), "of_bandwidth": bytes_read(models[kind]) / min(one) / best
        }  # fmt: skip
        figures["batch"][name] = {"seconds": spread(found[name, ROWS, 1])}
        if (name, 1, verified[-1]) in found:
            figures["verify"][name] = {str(n): min(found[name, 1, n]) / min(one) for n in verified}
    return figures


READER = """
typedef float vector __attribute__((vector_size(64)));
float read_all(const vector *from, long n, int threads)
{
    float found = 0;
    #pragma omp parallel num_threads(threads) reduction(+ : found)
    {
        vector sums[8] = {0};
        #pragma omp for schedule(static)
        for (long i = 0; i < n / 8; i++)
            for (int a = 0; a < 8; a++) sums[a] += from[i + a * (n / 8)];
        for (int a = 0; a < 8; a++) found += sums[a][0];
    }
    return found;
}
"""
"""Reads eight streams a thread: one alone is slower on some machines."""


def make_reader(folder: Path, threads: int) -> Callable[[torch.Tensor], object]:
    """A function that reads a tensor of a multiple of 512 bytes."""
    source, built = folder / "reader.c", folder / "reader.so"
    source.write_text(READER, encoding="utf-8")
    flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
    subprocess.run(["cc", *flags, str(source), "-o", str(built)], check=True)
    read_all = ctypes.CDLL(str(built)).read_all
    read_all.argtypes = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    return lambda buffer: read_all(buffer.data_ptr(), buffer.nbytes // 64, threads)


def show(shape: str, figures: dict[str, Any]) -> None:
    """The tables."""
    print(f"\n{shape}: bandwidth {figures['bandwidth']['max'] / 2**30:.1f} GiB/s")
    head = ["", "ms a token", "of bandwidth", "× transformers f32", "× llama.cpp"]
    head += ["batch of 8: tokens/s", "× transformers", "× llama.cpp"]
    print(f"| {' | '.join(head)} |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in figures["decode"].items():
        kind = name.split()[-1]
        cells = [f"{row['seconds']['min'] * 1e3:.3f}", f"{row['of_bandwidth']:.0%}"]
        cells += [ratio(figures["decode"], f"{other}", name) for other in ("transformers f32", f"llama.cpp {kind}")]
        cells.append(f"{ROWS / figures['batch'][name]['seconds']['min']:,.0f}")
        same = f"transformers {kind if kind in ('f32', 'bf16') else 'bf16'}"
        cells += [ratio(figures["batch"], other, name) for other in (same, f"llama.cpp {kind}")]
        print(f"| {name} | {' | '.join(cells)} |")
    for kind in ("f32", "bf16"):
        times = ratio(figures["prompt"], f"transformers {kind}", f"engine {kind}")
        print(f"a prompt, {kind}: {times} × transformers")
    for name, row in figures["verify"].items():
        print(f"{name}: " + "  ".join(f"v({n}) = {value:.2f}" for n, value in row.items()))


def ratio(rows: dict[str, Any], other: str, name: str) -> str:
    """How many times faster than another."""
    if other not in rows:
        return "–"
    return f"{rows[other]['seconds']['min'] / rows[name]['seconds']['min']:.2f}"


if __name__ == "__main__":
    main()
