"""What the optimizers cost in a step: clipping, AdamW and Muon beside forward and backward, each in its forms.

For two sizes of model: AdamW fused and as passes one after another, Muon in batches near the cache and all matrices
of a shape at once. All are interleaved in one process; the shortest time of each counts for the shares.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from record import spread, write_result

from groundup.environment import usable_cores
from groundup.model import Transformer, preset
from groundup.recipe import OptimizerSettings
from groundup.training import choose_precision, head_loss, muon
from groundup.training.optimizers import Optimizers, clip_gradients
from groundup.training.process import keep_freed_memory

SIZES = {
    "0.95M": ({"vocab_size": 1024, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "head_dim": 32, "d_model": 128,
               "d_ff": 384, "context_length": 256}, 16),
    "13.9M": ({"vocab_size": 8192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "head_dim": 64, "d_model": 384,
               "d_ff": 1024, "context_length": 256}, 8),
}  # fmt: skip


def main() -> None:
    """Time every part for some rounds, and print medians and shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=usable_cores())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    precision, reason = choose_precision("auto")
    rows = []
    for size, (shape, n_rows) in SIZES.items():
        seconds = measure(Transformer(preset("ground-1m", **shape)), n_rows, precision, arguments.rounds)
        whole = seconds["forward and backward"]
        for name, values in seconds.items():
            found = spread(values)
            share = found["min"] / (found["min"] + min(whole)) if values is not whole else 1.0
            rows.append({"size": size, "part": name, "seconds": found, "share_of_a_step": share})
            print(f"| {size} | {name} | {1000 * found['median']:.1f} | {share:.1%} |")
    write_result("optimizer_step", {"precision": f"{precision} ({reason})", "threads": arguments.threads, "rows": rows})


def measure(model: Transformer, n_rows: int, precision: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Seconds of each part, one a round."""
    model.compute_dtype = precision
    config = model.config
    ids = torch.randint(0, config.vocab_size, (n_rows, config.context_length + 1))
    both = Optimizers(model, OptimizerSettings(), precision)
    all_adamw = Optimizers(model, OptimizerSettings(optimizer="adamw"), precision)
    passes = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

    def learn() -> None:
        (model(ids[:, :-1], head=head_loss(ids[:, 1:])).objective / ids[:, 1:].numel()).backward()

    def all_at_once() -> None:
        before = dict(muon.BATCH_BYTES)
        muon.BATCH_BYTES["cpu"] = 1 << 40
        both.all[-1].step()
        muon.BATCH_BYTES.update(before)

    parts: dict[str, Callable[[], object]] = {
        "forward and backward": learn,
        "norm and clipping": lambda: clip_gradients(both.parameters(), 1.0),
        "Muon, in batches near the cache": both.all[-1].step,
        "Muon, all of a shape at once": all_at_once,
        "AdamW beside Muon, fused": both.all[0].step,
        "AdamW for all, fused": all_adamw.all[0].step,
        "AdamW for all, pass after pass": passes.step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            if number:  # the first round allocates
                seconds[name].append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return seconds


if __name__ == "__main__":
    main()
