"""What HTTP costs: streams beside the engine's own throughput, the server's CPU a token, and llama.cpp's server.

    over HTTP ÷ engine    tokens a second of n streams, by a client in a process of its own, and of `Engine.run` with
                          the same prompts; they take turns, ratio of the rounds' medians (wanted: 0.9 at least)
    server CPU a token    of the event loop's thread while it streams (wanted: 50 µs at most)
    beside llama.cpp      time to the first token and tokens a second at 1, 8 and 32 streams: llama-cpp-python's server
                          on the same weights as a GGUF file of float32. It answers one request after the other:
                          they are sent one by one, and their wait counts.

Weights are random: speed does not depend on them. llama.cpp needs an environment of its own, named by --python, with
`llama-cpp-python[server]`; without one its rows are left out.

Examples:
    python benchmarks/serving.py --python benchmarks/.cache/llama_cpp/bin/python
    python benchmarks/serving.py --quick --shape demo
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import decode
import torch
from record import spread, write_result

from groundup.environment import version_of
from groundup.generation import Engine, Request, SamplingParams, prompt_ids
from groundup.interop.gguf import export_gguf
from groundup.model import Transformer
from groundup.serving.server import listen, make_server
from groundup.serving.state import ServedModel, State
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.adversarial import adversarial_texts

HERE = Path(__file__).resolve().parent
WORKER = HERE / "baselines" / "llama_cpp_server.py"
CLIENT = HERE / "baselines" / "stream_client.py"
VOCABULARY = 2048
TEXT = "the cat sat on a mat and saw one big red dog run home with an old king who gave bread to poor children"
WORDS = TEXT.split()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", type=Path, default=decode.LLAMA_CPP, help="of an environment with llama.cpp's server"
    )
    parser.add_argument("--shape", choices=decode.SHAPES, default="26M")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the engine (default: 1; the client needs a core, too)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="of each text")
    parser.add_argument("--quick", action="store_true", help="two rounds of short texts; nothing is recorded")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.tokens = 2, 48
    torch.set_num_threads(arguments.threads)
    config = decode.SHAPES[arguments.shape]()
    tokenizer = Tokenizer.train([TEXT, *adversarial_texts(2000, seed=1)], vocab_size=VOCABULARY, split="qwen2")
    config = type(config)(**{**config.__dict__, "vocab_size": tokenizer.vocab_size})
    model = decode.models_of(config)["f32"]
    # Nothing ends a text, and it is ASCII: llama-cpp-python writes on for ever behind a character that is not whole.
    silent = [index for index, token in tokenizer.vocab().items() if isinstance(token, str) or not token.isascii()]
    with torch.no_grad():
        (model.embed_tokens if model.lm_head is None else model.lm_head).weight[silent] = 0
    found: dict[str, Any] = {
        "shape": arguments.shape, "threads": arguments.threads, "rounds": arguments.rounds, "tokens": arguments.tokens,
        "vocab_size": tokenizer.vocab_size, "prompt_tokens": len(prompt_ids(tokenizer, prompts_of(0, 1)[0])),
    }  # fmt: skip
    engine = Engine(model, tokenizer, slots=32, length=256)
    with listen("127.0.0.1", 0) as ours:
        server = make_server(State([ServedModel("small", engine)]))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [ours]})
        thread.start()
        url = f"http://127.0.0.1:{ours.getsockname()[1]}"
        wait_for(url)
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        found["own"] = [beside_engine(engine, url, clock, n, arguments) for n in (8, 32)]
        if arguments.python.is_file():
            asked = [str(arguments.python), "-c", "import llama_cpp; print(llama_cpp.__version__)"]
            found["llama_cpp_python"] = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
            found["beside_llama_cpp"] = beside_llama_cpp(model, tokenizer, url, arguments)
        server.should_exit = True
        thread.join()
    found["versions"] = {name: version_of(name) for name in ("starlette", "uvicorn", "httptools", "uvloop")}
    if arguments.quick:
        print(json.dumps(found))
    else:
        write_result("serving", found)


def prompts_of(number: int, n: int) -> list[str]:
    """Words, others for each number, so that no beginning is known."""
    chance = random.Random(number)
    return [" ".join(chance.choices(WORDS, k=24)) for _ in range(n)]


def beside_engine(engine: Engine, url: str, clock: int, n: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """n streams over HTTP and n texts of the engine alone."""
    rates: dict[str, list[float]] = {"engine": [], "http": []}
    cpu = []
    assert engine.tokenizer is not None
    params = SamplingParams(0, max_tokens=arguments.tokens)
    for number in range(arguments.rounds + 1):
        ids = [prompt_ids(engine.tokenizer, prompt) for prompt in prompts_of(100 + number, n)]
        begin = time.perf_counter()
        engine.run([Request(one, params) for one in ids])
        alone = n * arguments.tokens / (time.perf_counter() - begin)
        before = time.clock_gettime(clock)
        answer = client(url, prompts_of(200 + number, n), arguments.tokens, n)
        spent = time.clock_gettime(clock) - before
        if number:  # the first one warms up
            rates["engine"].append(alone)
            rates["http"].append(answer["tokens_per_second"])
            cpu.append(1e6 * spent / (n * arguments.tokens))
    ratio = statistics.median(rates["http"]) / statistics.median(rates["engine"])
    print(
        f"{n} streams: {statistics.median(rates['http']):,.0f} tok/s over HTTP, by the engine alone "
        f"{statistics.median(rates['engine']):,.0f}: {ratio:.2f} (wanted: ≥ 0.9); "
        f"server {statistics.median(cpu):.0f} µs a token (wanted: ≤ 50)",
        flush=True,
    )
    return {"streams": n, "ratio": ratio, "microseconds_per_token": spread(cpu)} | {
        k: spread(v) for k, v in rates.items()
    }


def beside_llama_cpp(
    model: Transformer, tokenizer: Tokenizer, url: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Both servers, taking turns."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        file = Path(folder) / "small.gguf"
        export_gguf(model, tokenizer, file, dtype="f32")
        command = [str(arguments.python), str(WORKER), str(file), str(port), str(arguments.threads), "512"]
        process = subprocess.Popen(command)
        try:
            urls = {"groundup": url, "llama.cpp": f"http://127.0.0.1:{port}"}
            wait_for(urls["llama.cpp"])
            for n in (1, 8, 32):
                found: dict[str, list[dict[str, Any]]] = {name: [] for name in urls}
                for number in range(arguments.rounds + 1):
                    for name, where in urls.items():
                        answer = client(
                            where, prompts_of(300 + number, n), arguments.tokens, 1 if name == "llama.cpp" else n
                        )
                        found[name] += [answer] if number else []
                row: dict[str, Any] = {"streams": n}
                for name, answers in found.items():
                    row[name] = {key: spread([one[key] for one in answers]) for key in answers[0]}
                    rate, first = (row[name][key]["median"] for key in ("tokens_per_second", "first_token_seconds"))
                    print(
                        f"{n} streams, {name}: {rate:,.0f} tok/s, first token after {1000 * first:.1f} ms", flush=True
                    )
                rows.append(row)
        finally:
            process.terminate()
            process.wait()
    return rows


def wait_for(url: str) -> None:
    """Until the server answers."""
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
        except OSError:
            assert time.monotonic() < end, f"{url}: no server"
            time.sleep(0.1)
        else:
            return


def client(url: str, prompts: list[str], tokens: int, at_once: int) -> dict[str, float]:
    """What a stream of each prompt gets, of a client in a process of its own."""
    asked = json.dumps({"prompts": prompts, "tokens": tokens, "at_once": at_once})
    command = [sys.executable, str(CLIENT), url.removeprefix("http://"), asked]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


if __name__ == "__main__":
    main()
