"""llama.cpp's side of `benchmarks/decode.py`: times steps of GGUF files, asked by lines of JSON on standard input.

Runs in an environment of its own, which has llama-cpp-python and nothing of groundup.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import llama_cpp
from llama_cpp_reader import params_for_any_machine

MOST_ROWS = 8
QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)


class Timed:
    """One file, and as many texts as rows are timed with.

    Args:
        file: GGUF.
        threads: of llama.cpp.
        context: tokens that stand in every text's cache before a step.
        most_tokens: of a step.
    """

    def __init__(self, file: str, threads: int, context: int, most_tokens: int) -> None:
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), params_for_any_machine())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = MOST_ROWS * 256, MOST_ROWS
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.start = context
        self.batch = llama_cpp.llama_batch_init(max(MOST_ROWS, most_tokens, context), 0, 1)
        for row in range(MOST_ROWS):
            self.decode([(row, position) for position in range(context)])

    def decode(self, places: list[tuple[int, int]]) -> None:
        """One step of tokens at (row, position)."""
        batch = self.batch
        batch.n_tokens = len(places)
        for i, (row, position) in enumerate(places):
            batch.token[i], batch.pos[i], batch.logits[i] = (7 * i + position) % 500, position, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama.cpp could not decode")

    def seconds(self, rows: int, tokens: int, steps: int, clock: Any) -> float:
        """Seconds of a step, the mean of some."""
        places = [(row, self.start + i) for row in range(rows) for i in range(tokens)]
        total = 0.0
        for _ in range(steps):
            begin = clock()
            self.decode(places)
            llama_cpp.llama_synchronize(self.context)
            total += clock() - begin
            for row in range(rows):
                llama_cpp.llama_memory_seq_rm(self.memory, row, self.start, -1)
        return total / steps


def main() -> None:
    """Answer until standard input ends."""
    llama_cpp.llama_log_set(QUIET, None)
    llama_cpp.llama_backend_init()
    files: dict[str, Timed] = {}
    for line in sys.stdin:
        task = json.loads(line)
        if task == {"task": "version"}:
            print(json.dumps({"version": llama_cpp.__version__}), flush=True)
            continue
        clock = time.process_time if task["threads"] == 1 else time.perf_counter
        name = task["file"]
        if name not in files:
            files[name] = Timed(name, task["threads"], task["context"], task["most_tokens"])
        found = files[name].seconds(task["rows"], task["tokens"], task["steps"], clock)
        print(json.dumps({"seconds": found}), flush=True)


if __name__ == "__main__":
    main()
