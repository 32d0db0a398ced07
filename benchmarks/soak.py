"""Sixty-four clients do everything wrong for minutes: the good ones get right answers only, and memory stays flat.

The server runs in a process of its own (`groundup serve`, with a key, on a port of 127.0.0.1) with a tiny random model;
here run the clients, each a loop of one kind: whole and streamed answers that are compared with the engine's own,
streams that are left, bodies that end in the middle, bodies that are too large, JSON that is none, wrong keys, foreign
names, readers that hardly read, connections that say nothing. Bounded in time, nothing leaves this machine.

Ends with status 1 where a good client got a wrong answer or none, an error had another status than it should, or the
server's memory grew by more than a tenth (and 32 MiB) from the second quarter on.

Examples:
    python benchmarks/soak.py
    python benchmarks/soak.py --minutes 0.5 --quick
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from record import write_result

from groundup.generation import Engine, Request, SamplingParams, prompt_ids
from groundup.interop import load, save_model
from groundup.model import Transformer, preset
from groundup.serving.server import listen
from groundup.tokenizer import Tokenizer

KEY = "soak-key"
TEXT = "Once upon a time there was a small house at the edge of the forest. The cat sat at the window. naïve 東京 🙂 "
N_ANSWERS, N_TOKENS = 16, 24
GROWTH, SLACK = 1.1, 32 * 2**20


def main() -> int:
    """Serve, ask, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="nothing is recorded")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "small"
        save_model(folder, *tiny())
        expected = answers(folder)
        with listen("127.0.0.1", 0) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "groundup", "serve", str(folder), "--port", str(port), "--slots", "8"]
        log = Path(name) / "log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command, stderr=errors, env={**os.environ, "GROUNDUP_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
            )
            try:
                soak = Soak(port, expected, psutil.Process(process.pid))
                asyncio.run(soak.run(arguments.minutes * 60, arguments.clients))
                process.send_signal(signal.SIGTERM)
                process.wait(60)
            finally:
                process.kill()
        said = log.read_text(errors="replace")
    report = soak.report() | {"minutes": arguments.minutes, "clients": arguments.clients}
    report["tracebacks"] = said.count("Traceback")
    report["passes"] = not (report["wrong"] or report["tracebacks"]) and report["memory_is_flat"]
    print(json.dumps(report, indent=2))
    if not arguments.quick:
        write_result("soak", report)
    return 0 if report["passes"] else 1


def tiny() -> tuple[Transformer, Tokenizer]:
    """A random model and a tokenizer that fits it."""
    tokenizer = Tokenizer.train([TEXT] * 3, vocab_size=320, spare_tokens=0)
    model = Transformer(preset("ground-nano", vocab_size=tokenizer.vocab_size, context_length=512), seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model, tokenizer


def answers(folder: Path) -> dict[str, str]:
    """What each prompt is answered with, by the engine in this process."""
    loaded = load(folder)
    assert loaded.tokenizer is not None
    prompts = [TEXT[place : place + 9 + place] for place in range(N_ANSWERS)]
    params = SamplingParams(0, max_tokens=N_TOKENS)
    requests = [Request(prompt_ids(loaded.tokenizer, prompt), params) for prompt in prompts]
    found = Engine(loaded.model, loaded.tokenizer, slots=8).run(requests)
    return {prompt: texts[0].text for prompt, texts in zip(prompts, found, strict=True)}


class Soak:
    """The clients and what they saw.

    Args:
        port: of the server.
        expected: the right answers by prompt.
        process: the server.
    """

    def __init__(self, port: int, expected: dict[str, str], process: psutil.Process) -> None:
        self._port, self._expected, self._process = port, expected, process
        self._seen: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._memory: list[int] = []
        self._end = 0.0

    async def run(self, seconds: float, n_clients: int) -> None:
        """All clients, until the time is over."""
        await self._wait()
        self._end = time.monotonic() + seconds
        kinds: list[Callable[[], Awaitable[None]]] = [
            self.whole, self.streamed, self.whole, self.streamed, self.leaves, self.half_body, self.huge_body,
            self.not_json, self.wrong_key, self.foreign_name, self.hardly_reads, self.says_nothing,
        ]  # fmt: skip
        await asyncio.gather(self._watch(), *(self._loop(kinds[at % len(kinds)], at) for at in range(n_clients)))
        await self._wait()  # and it still answers

    async def _loop(self, kind: Callable[[], Awaitable[None]], number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < self._end:
            try:
                async with asyncio.timeout(60):
                    await kind()
                self._seen[kind.__name__] += 1
            except Exception as error:
                self._wrong.append(f"{kind.__name__}: {type(error).__name__}: {str(error)[:200]}")
            await asyncio.sleep(chance.random() * 0.05)

    async def _watch(self) -> None:
        while time.monotonic() < self._end:
            self._memory.append(self._process.memory_info().rss)
            await asyncio.sleep(1)

    async def _wait(self) -> None:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                if (await self._ask("GET", "/ready"))[0] == 200:
                    return
            assert time.monotonic() < end, "the server is not ready"
            await asyncio.sleep(0.2)

    # What clients do.

    async def whole(self) -> None:
        """Ask, and compare."""
        prompt = random.choice(list(self._expected))
        status, answer = await self._ask("POST", "/v1/completions", {**_asked(prompt), "stream": False})
        if status == 503:
            self._seen["sent away"] += 1
            return
        assert status == 200, answer
        assert json.loads(answer)["choices"][0]["text"] == self._expected[prompt], prompt

    async def streamed(self) -> None:
        """Ask, put the pieces together, and compare."""
        prompt = random.choice(list(self._expected))
        status, answer = await self._ask("POST", "/v1/completions", {**_asked(prompt), "stream": True})
        if status == 503:
            self._seen["sent away"] += 1
            return
        assert status == 200, answer
        *events, done = [one.removeprefix("data: ") for one in answer.decode().split("\n\n") if one]
        choices = [json.loads(one)["choices"][0] for one in events]
        assert done == "[DONE]"
        assert choices[-1]["finish_reason"] is not None
        assert "".join(one["text"] for one in choices) == self._expected[prompt], prompt

    async def leaves(self) -> None:
        """Leave in the middle of a stream."""
        reader, writer = await self._send(
            "POST", "/v1/completions", {**_asked("Once"), "max_tokens": 400, "stream": True}
        )
        await reader.read(random.randrange(1, 2000))
        writer.transport.abort()

    async def half_body(self) -> None:
        """Promise more than is sent."""
        _, writer = await self._send("POST", "/v1/completions", b'{"prompt": "On', length=100)
        await asyncio.sleep(random.random() * 0.2)
        writer.close()

    async def huge_body(self) -> None:
        """More than a request may have."""
        status, _ = await self._ask("POST", "/v1/completions", b'{"prompt": "' + b"a" * 2_100_000 + b'"}')
        assert status == 413, status

    async def not_json(self) -> None:
        """Bytes, nulls, lists, unknown fields."""
        body = random.choice([b"{", b"\xff\xfe", b"[]", b'{"prompt": 1}', b'{"prompt": "a", "n": 1e9}', b"[" * 50_000])
        status, answer = await self._ask("POST", "/v1/completions", body)
        assert status == 400, (status, body[:40])
        assert json.loads(answer)["error"]["message"]

    async def wrong_key(self) -> None:
        """No key, or another."""
        status, _ = await self._ask(
            "POST", "/v1/completions", _asked("Once"), key=random.choice(["", "soak-kez", "x" * 5000])
        )
        assert status == 401, status

    async def foreign_name(self) -> None:
        """A name that somebody pointed here."""
        assert (await self._ask("GET", "/v1/models", host="evil.example"))[0] == 421

    async def hardly_reads(self) -> None:
        """A reader that takes a byte now and then."""
        reader, writer = await self._send(
            "POST", "/v1/completions", {**_asked("Once"), "max_tokens": 400, "stream": True}
        )
        for _ in range(20):
            await reader.read(16)
            await asyncio.sleep(0.05)
        writer.transport.abort()

    async def says_nothing(self) -> None:
        """A connection and half a line."""
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(random.choice([b"", b"GET", b"GET / HTTP/1.1\r\nHost: loc"]))
        await asyncio.sleep(random.random())
        writer.close()

    # Bytes.

    async def _send(
        self,
        method: str,
        path: str,
        body: Any = b"",
        *,
        key: str = KEY,
        host: str = "localhost",
        length: int | None = None,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        contents = body if isinstance(body, bytes) else json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
        more = f"Content-Type: application/json\r\nContent-Length: {length or len(contents)}\r\n\r\n"
        writer.write((head + more).encode() + contents)
        return reader, writer

    async def _ask(self, method: str, path: str, body: Any = b"", **more: Any) -> tuple[int, bytes]:
        reader, writer = await self._send(method, path, body, **more)
        try:
            head, _, contents = (await reader.read(-1)).partition(b"\r\n\r\n")
        finally:
            writer.close()
        if b"transfer-encoding: chunked" in head.lower():
            pieces, rest = [], contents
            while rest:
                size, _, rest = rest.partition(b"\r\n")
                pieces.append(rest[: int(size, 16)])
                rest = rest[int(size, 16) + 2 :]
            contents = b"".join(pieces)
        return int(head.split(b" ", 2)[1]), contents

    def report(self) -> dict[str, Any]:
        """What was seen, and how memory went."""
        quarter = max(1, len(self._memory) // 4)
        early, late = (
            statistics.median(self._memory[quarter : 2 * quarter] or self._memory),
            max(self._memory[-quarter:]),
        )
        return {
            "seen": dict(sorted(self._seen.items())), "n_wrong": len(self._wrong), "wrong": self._wrong[:20],
            "memory_mib": {"early": early / 2**20, "late": late / 2**20, "most": max(self._memory) / 2**20},
            "memory_is_flat": late < GROWTH * early + SLACK,
        }  # fmt: skip


def _asked(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": N_TOKENS, "temperature": 0}


if __name__ == "__main__":
    sys.exit(main())
