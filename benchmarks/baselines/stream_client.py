"""The client of `benchmarks/serving.py`: n streams at the same time, read as fast as they come.

In: HOST:PORT, and as JSON the prompts, the tokens of each answer and how many are asked at once: the others wait, and
that is part of their time. Out, as JSON: tokens a second of all
together, and the median of the seconds to their first tokens.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time


async def ask_all(address: str, prompts: list[str], tokens: int, at_once: int) -> dict[str, float]:
    """All streams."""
    begin, free = time.perf_counter(), asyncio.Semaphore(at_once)

    async def one(prompt: str) -> float:
        async with free:
            return await ask(address, prompt, tokens) - begin

    firsts = await asyncio.gather(*map(one, prompts))
    seconds = time.perf_counter() - begin
    return {"tokens_per_second": len(prompts) * tokens / seconds, "first_token_seconds": statistics.median(firsts)}


async def ask(address: str, prompt: str, tokens: int) -> float:
    """One stream, read to its end; when its first token came."""
    host, _, port = address.partition(":")
    body = {"model": "small", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    contents = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{head}Content-Length: {len(contents)}\r\n\r\n".encode() + contents)
    first, told = None, b""
    while piece := await reader.read(65536):
        told += piece
        if first is None and b"data: {" in told:
            first = time.perf_counter()
    writer.close()
    assert told.startswith(b"HTTP/1.1 200"), told[:500]
    assert b'"length"' in told, told[-500:]
    assert first is not None
    return first


if __name__ == "__main__":
    print(json.dumps(asyncio.run(ask_all(sys.argv[1], **json.loads(sys.argv[2])))))
