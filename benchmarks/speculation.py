"""Speculation beside our own plain decoding, on models trained here: where it pays, and where it does not.

`groundup build` trains three models on the shipped classics, once (`benchmarks/.cache/speculation`): a target of 7 M
parameters, the target fine-tuned to copy a passage or to put one word for another in it, and a draft distilled from
the target that reads a twenty-second part of its weights for a token. Then texts are written one by one with and
without guesses, in turns, and tokens a second are compared with those of the fastest precision without.

    copies, edits     prompt lookup: what followed the last tokens before; greedy, answers of the fine-tuned target
    the classics      the distilled draft, the model's own first blocks and prompt lookup: the target goes on with
                      held-out text; greedy, and at temperature 1
    random tokens     the same behind a prompt that no draft can make sense of, at temperature 1

Passages of the copies are of the training text, cut elsewhere; what is measured is how the model copies, not what it
knows: the share of answers that are right word for word is printed.

Examples:
    python benchmarks/speculation.py
    python benchmarks/speculation.py --threads 1
    nice -n 15 python benchmarks/speculation.py --train-only
    python benchmarks/speculation.py --run benchmarks/.cache/speculation/run
    python benchmarks/speculation.py --quick
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from engine import CACHE, Setting, row_of
from record import write_result

from groundup.generation import Engine, Request, SamplingParams
from groundup.generation.quantize import quantize
from groundup.interop import load
from groundup.model import Transformer
from groundup.shards import TokenShards
from groundup.tokenizer import Tokenizer, render

KINDS = ("f32", "bf16", "int8")
N_TEXTS, N_NEW = 8, 96
WORDS = 40
"""Of a passage: question and answer fit into the context."""

RECIPE = """
name = "speculation"
seed = 1
[corpus]
inputs = ["groundup:classics"]
dedup = "exact"
[tokenizer]
vocab_size = 2_048
[model]
preset = "{preset}"
context_length = 256
[pretrain]
tokens = 800_000
batch_size = 16
[align.copying]
method = "sft"
start = "pretrain"
data = [{conversations}]
batch_size = 16
epochs = 2
[align.draft]
method = "distill"
start = "pretrain"
tokens = 800_000
own_tokens = 80_000
batch_size = 16
[align.draft.model]
preset = "ground-1m"
n_layers = 3
n_heads = 2
n_kv_heads = 2
d_model = 64
d_ff = 256
[evaluate]
tasks = []
"""


class Case(NamedTuple):
    """What is written, and what guesses.

    Attributes:
        what: which prompts.
        model: a stage of the run.
        temperature: at which tokens are drawn.
        drafts: by name, as `Engine` takes them, and how many times as fast each has to be.
    """

    what: str
    model: str
    temperature: float
    drafts: dict[str, float]


CASES = (
    Case("copies", "copying", 0, {"ngrams": 1.5}),
    Case("edits", "copying", 0, {"ngrams": 1.5}),
    Case("the classics", "pretrain", 0, {"draft": 1.2, "2 blocks": 0.95, "ngrams": 0.95}),
    Case("the classics", "pretrain", 1, {"draft": 0.95, "2 blocks": 0.95, "ngrams": 0.95}),
    Case("random tokens", "pretrain", 1, {"draft": 0.95, "2 blocks": 0.95, "ngrams": 0.95}),
)


def main() -> None:
    """Train what is not trained yet, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="hardly trained models, two rounds; nothing is recorded")
    parser.add_argument("--train-only", action="store_true", help="train what is not trained yet, measure nothing")
    parser.add_argument("--run", type=Path, help="a run that has the three models already, of any version")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = Setting(arguments.threads, 2 if arguments.quick else arguments.rounds, arguments.quick)
    run = arguments.run or trained(is_quick=arguments.quick)
    if arguments.train_only:
        return
    stages = ("pretrain", "copying", "draft")
    models = {stage: load(run, stage=stage).model for stage in stages}
    tokenizer = load(run, stage="copying").tokenizer
    assert tokenizer is not None
    rows = [row for case in CASES for row in measure(setting, case, models, tokenizer, run)]
    figures = {stage: summary_of(run, stage) for stage in stages}
    print(f"draft: {figures['draft'].get('acceptance', 0):.0%} of its guesses on held-out text would be kept")
    if not arguments.quick:
        head = {"threads": arguments.threads, "rounds": arguments.rounds, "training": figures}
        write_result("speculation", {**head, "rows": rows})


def trained(*, is_quick: bool) -> Path:
    """The run with the three models."""
    folder = CACHE / ("speculation-quick" if is_quick else "speculation")
    folder.mkdir(parents=True, exist_ok=True)
    conversations, recipe = folder / "conversations.jsonl", folder / "speculation.toml"
    with conversations.open("w", encoding="utf-8") as handle:
        for number in range(200 if is_quick else 3000):
            question, answer = task(random.Random(number), ("copies", "edits")[number % 2])
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            handle.write(json.dumps({"messages": turns}) + "\n")
    preset = "ground-1m" if is_quick else "ground-10m"
    recipe.write_text(RECIPE.format(preset=preset, conversations=json.dumps(conversations.name)), encoding="utf-8")
    command = [sys.executable, "-m", "groundup", "build", recipe.name, "--out", "run"]  # the folder may be moved
    subprocess.run([*command, *(["--smoke"] if is_quick else [])], check=True, cwd=folder)
    return folder / "run"


def task(rng: random.Random, kind: str) -> tuple[str, str]:
    """A passage to copy, or one in which a word is to be put for another; and the answer."""
    words = classics()
    first = rng.randrange(len(words) - WORDS)
    passage = words[first : first + WORDS]
    if kind == "copies":
        return f"Copy: {' '.join(passage)}", " ".join(passage)
    old, new = rng.choice([word for word in passage if word.isalpha()]), rng.choice(("Tom", "Anna", "Peter", "Lucy"))
    question = f"Put {new} for {old}: {' '.join(passage)}"
    return question, " ".join(new if word == old else word for word in passage)


def classics(found: list[str] = []) -> list[str]:  # noqa: B006 - read once
    """The words of the shipped text."""
    if not found:
        text = resources.files("groundup").joinpath("data/classics.jsonl").read_text("utf-8")
        found += [word for line in text.splitlines() for word in json.loads(line)["text"].split()]
    return found


def summary_of(run: Path, stage: str) -> dict[str, Any]:
    """What training says of itself."""
    folder = run / stage if (run / stage).is_dir() else next(run.glob(f"*/{stage}"))
    summary = json.loads((folder / "stage.json").read_text(encoding="utf-8"))["summary"]
    return {name: summary[name] for name in ("parameters", "tokens", "val_loss", "acceptance") if name in summary}


def measure(
    setting: Setting, case: Case, models: dict[str, Transformer], tokenizer: Tokenizer, run: Path
) -> list[dict[str, Any]]:
    """Tokens a second in every precision, without guesses and with each draft."""
    runs = {}
    for kind in KINDS:
        target = in_precision(models[case.model], kind)
        for name in (None, *case.drafts):
            draft = models["draft"] if name == "draft" else int(name[0]) if name and name[0].isdigit() else name
            engine = Engine(target, slots=1, draft=draft)
            runs[f"{name or 'plain'} {kind}"] = Run(setting, case, engine, tokenizer, run)
    values = setting.take_turns(runs)
    plain = [f"plain {kind}" for kind in KINDS]
    fastest = max(plain, key=lambda name: statistics.median(values[name]))
    what = f"{case.what}, temperature {case.temperature:g}"
    rows = []
    for name, made in runs.items():
        least = case.drafts.get(name.rsplit(" ", 1)[0]) if name.endswith(fastest.split()[-1]) else None
        rows.append(row_of(what, values, name, fastest, least, **made.facts()))
    return rows


def in_precision(model: Transformer, kind: str) -> Transformer:
    """A copy whose weights are f32, bf16 or int8."""
    found = copy.deepcopy(model)
    if kind == "int8":
        return quantize(found)
    if kind == "bf16":
        found.bfloat16()
        found.compute_dtype = torch.bfloat16
    return found


class Run:
    """Texts written one by one: tokens a second."""

    def __init__(self, setting: Setting, case: Case, engine: Engine, tokenizer: Tokenizer, run: Path) -> None:
        self._setting, self._case, self._engine, self._tokenizer = setting, case, engine, tokenizer
        self._shards = TokenShards.open(run / "shards", "validation", tokenizer_fingerprint=tokenizer.fingerprint)
        self._n_right = self._n_answers = 0

    def __call__(self, number: int) -> float:
        """One round."""
        prompts = [self._prompt(number * N_TEXTS + place) for place in range(N_TEXTS)]
        ends = (self._tokenizer.end_id,) if self._case.model == "copying" else ()
        params = SamplingParams(self._case.temperature, max_tokens=N_NEW, stop_ids=ends, ignore_eos=True)
        requests = [Request(ids, params, seed=place) for place, (ids, _) in enumerate(prompts)]
        seconds = self._setting.seconds(lambda: [self._engine.run([request]) for request in requests])
        results = [request.results[0] for request in requests]
        for result, (_, answer) in zip(results, prompts, strict=True):
            self._n_answers += answer is not None
            self._n_right += answer is not None and self._tokenizer.decode(result.ids) == answer
        return sum(result.n_tokens for result in results) / seconds

    def facts(self) -> dict[str, float]:
        """Shares of guesses that were kept and of answers that were right, and tokens of a step."""
        stats = self._engine.stats
        found = {"tokens_a_step": stats.new_tokens / stats.steps}
        if stats.drafted_tokens:
            found["accepted"] = stats.accepted_tokens / stats.drafted_tokens
        if self._n_answers:
            found["right"] = self._n_right / self._n_answers
        return found

    def _prompt(self, number: int) -> tuple[list[int], str | None]:
        rng = random.Random(1_000_000 + number)
        if self._case.what == "random tokens":
            return [rng.randrange(256, self._engine.config.vocab_size) for _ in range(32)], None
        if self._case.what == "the classics":
            return self._shards.window(rng.randrange(self._shards.n_tokens - 64), 64).tolist(), None
        question, answer = task(rng, self._case.what)
        rendered = render(self._tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
        return rendered.ids, answer


if __name__ == "__main__":
    main()
