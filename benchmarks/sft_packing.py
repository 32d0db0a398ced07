"""Fine-tuning steps on the demo's conversations: a conversation a row, padded, beside packed rows, with replay or none.

All variants take their steps in turn in one process, each with a model and optimizers of its own: forward, backward,
clipping and update, eager and (packed rows, which all have one length) compiled. A padded batch has 64 conversations,
a packed one 16 rows of 256 tokens. What counts is the time of an epoch: once through all conversations, and the
replayed text with them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import spread, write_result

from groundup.alignment import ConversationRows, SFTSettings, load_conversations
from groundup.console import Console
from groundup.corpus import Document
from groundup.environment import usable_cores
from groundup.model import Transformer, preset
from groundup.recipe import ShardsSettings
from groundup.shards import write_shards
from groundup.tokenizer import Tokenizer
from groundup.training import IGNORED, choose_precision, head_loss
from groundup.training.compilation import CompiledBlocks
from groundup.training.optimizers import Optimizers, clip_gradients
from groundup.training.process import keep_freed_memory

CLASSICS = Path(__file__).resolve().parents[1] / "groundup" / "data" / "classics.jsonl"
VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {"packing": False, "batch_size": 64},
    "packed": {"batch_size": 16},
    "packed, replay 0.25": {"batch_size": 16, "replay": 0.25},
    "packed, compiled": {"batch_size": 16, "compile": True},
    "packed, replay 0.25, compiled": {"batch_size": 16, "replay": 0.25, "compile": True},
}
VOCABULARY, CONTEXT, SEED = 2048, 256, 1


def main() -> None:
    """Time the variants for some rounds, print their table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="steps of each variant")
    parser.add_argument("--threads", type=int, default=usable_cores())
    arguments = parser.parse_args()
    if "GOMP_SPINCOUNT" not in os.environ:  # what the command line sets, before torch is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GOMP_SPINCOUNT": "10000"})
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    precision, reason = choose_precision("auto")
    texts = [json.loads(line)["text"] for line in CLASSICS.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer.train(texts, vocab_size=VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        documents = [
            Document(id=str(number), text=text, source="classics", split="train" if number else "validation")
            for number, text in enumerate(texts)
        ]
        write_shards(documents, tokenizer, Path(folder), ShardsSettings())
        variants = {name: Variant(what, tokenizer, Path(folder), precision) for name, what in VARIANTS.items()}
        for number in range(arguments.rounds + 2):
            for variant in variants.values():
                variant.step(number)
        rows = [{"variant": name, **variant.figures()} for name, variant in variants.items()]
    show(rows)
    about = {"precision": f"{precision} ({reason})", "threads": arguments.threads, "model": "ground-1m"}
    write_result("sft_packing", {**about, "rows": rows})


class Variant:
    """A model that is fine-tuned in one way."""

    def __init__(
        self, what: dict[str, Any], tokenizer: Tokenizer, shards: Path | None, precision: torch.dtype,
        context: int = CONTEXT,
    ) -> None:  # fmt: skip
        settings = SFTSettings(**{name: value for name, value in what.items() if name != "compile"})
        conversations = load_conversations(settings.data, settings.examples, SEED, "align.sft")
        self.source = ConversationRows(conversations, tokenizer, context, settings, SEED, shards)
        self.batch_size = settings.batch_size
        self.model = Transformer(preset("ground-1m", vocab_size=tokenizer.vocab_size, context_length=context))
        self.model.compute_dtype = precision
        self.optimizers = Optimizers(self.model, settings, precision)
        if what.get("compile"):
            CompiledBlocks(self.model, Console())
        self.seconds: list[float] = []
        self.targets = 0

    def step(self, number: int) -> None:
        """A whole step; the first two allocate and compile, and are not counted."""
        start = time.perf_counter()
        batch = self.source.rows(number * self.batch_size, (number + 1) * self.batch_size)
        targets = batch["targets"]
        count = int((targets != IGNORED).sum())
        borders = {name: batch[name] for name in ("documents", "positions") if name in batch}
        (self.model(batch["ids"], head=head_loss(targets), **borders).objective / count).backward()
        clip_gradients(self.optimizers.parameters(), 1.0)
        self.optimizers.step(1.0)
        if number >= 2:
            self.seconds.append(time.perf_counter() - start)
            self.targets += count

    def figures(self) -> dict[str, Any]:
        """What a step and an epoch take."""
        n_rows = self.source.rows_of_epochs(1)
        steps, median = n_rows / self.batch_size, spread(self.seconds)["median"]
        made = self.source.figures(n_rows)
        return {
            "batch_size": self.batch_size,
            "steps_per_epoch": steps,
            "seconds_per_step": spread(self.seconds),
            "seconds_per_epoch": steps * median,
            "conversation_targets_per_second": made["supervised_tokens"] / (steps * median),
            "targets_per_second": self.targets / sum(self.seconds),
            **{name: made[name] for name in ("packing_efficiency", "replay_share") if name in made},
        }


def show(rows: list[dict[str, Any]]) -> None:
    """The table of the docs."""
    print("| rows | steps an epoch | ms a step | targets/s | seconds an epoch | times as fast |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['variant']} | {row['steps_per_epoch']:.0f} | {1000 * row['seconds_per_step']['median']:.0f} "
            f"| {row['targets_per_second']:,.0f} | {row['seconds_per_epoch']:.1f} "
            f"| {rows[0]['seconds_per_epoch'] / row['seconds_per_epoch']:.2f} |"
        )


if __name__ == "__main__":
    main()
