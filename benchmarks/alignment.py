"""DPO and GRPO steps beside TRL's, packed rows of fine-tuning beside padded ones, and the memory of DPO with LoRA.

Every contestant of the first part is a process of its own that stays alive; they take turns, so that a slow minute of
the machine is everybody's. Same weights, same batch, forward, backward, clipping and AdamW; that both compute the same
loss at the first step is checked. TRL's step is its trainer's loss with the same optimizer around it, without what the
trainer adds. TRL runs the reference model in each step of DPO, unless it was told to do that before, as we do: so both
are there, and ours with the reference's pass beside it.

Rows are of the demo's conversations and, where its file is there, of Dolly's. Memory is that of two steps with a
micro-batch of two pairs, each in a process of its own: all its tensors together at the fullest moment, as torch's
profiler records every allocation, and the process's peak above what it held before the model was loaded.

Examples:
    python benchmarks/alignment.py --python .venv-trl/bin/python    # an environment with trl==1.16.0
    python benchmarks/alignment.py --only rows memory
    python benchmarks/alignment.py --quick
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "1m": {"vocab_size": 1024, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "d_model": 128, "d_ff": 344},
    "14m": {"vocab_size": 8192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "d_model": 384, "d_ff": 1024},
    "124m": {"vocab_size": 50304, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "d_model": 768, "d_ff": 2048},
}
CONTEXT, ROWS, MAX_TOKENS, BETA = 256, 16, 64, 0.1
CONTESTANTS: dict[str, dict[str, dict[str, Any]]] = {
    "dpo": {
        "groundup": {"who": "groundup", "beside": "TRL, reference before"},
        "groundup, with the reference's pass": {"who": "groundup", "reference": True, "beside": "TRL"},
        "groundup, bfloat16": {"who": "groundup", "bfloat16": True, "beside": "TRL, reference before, bfloat16"},
        "TRL": {"who": "trl", "reference": True},
        "TRL, reference before": {"who": "trl"},
        "TRL, reference before, bfloat16": {"who": "trl", "bfloat16": True},
    },
    "grpo": {
        "groundup": {"who": "groundup", "beside": "TRL"},
        "groundup, bfloat16": {"who": "groundup", "bfloat16": True, "beside": "TRL, bfloat16"},
        "TRL": {"who": "trl"},
        "TRL, bfloat16": {"who": "trl", "bfloat16": True},
    },
}
DOLLY = Path(__file__).resolve().parents[2] / "shared/data/instruct/dolly_hhrlhf_small/dolly_hhrlhf_train_small.jsonl"
Step = Callable[[], float]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=("steps", "rows", "memory"), default=["steps", "rows", "memory"])
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["1m", "14m"], help="of the steps")
    parser.add_argument("--memory-sizes", nargs="*", choices=SIZES, default=[*SIZES])
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contestant, of two steps and more")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--python", help="of an environment with TRL (default: ours alone is measured)")
    parser.add_argument("--dolly", type=Path, default=DOLLY)
    parser.add_argument("--quick", action="store_true", help="the smallest model, two turns; nothing is recorded")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        serve(json.loads(arguments.child))
        return
    if arguments.quick:
        arguments.sizes, arguments.memory_sizes, arguments.rounds = ["1m"], ["1m"], 2
    found: dict[str, Any] = {"threads": arguments.threads}
    if "steps" in arguments.only:
        found["steps"] = [race(size, method, arguments) for size in arguments.sizes for method in CONTESTANTS]
    if "rows" in arguments.only:
        found["rows"] = rows(arguments)
    if "memory" in arguments.only:
        found["memory"] = memory(arguments)
    if not arguments.quick:
        from record import write_result

        write_result("alignment", found)


# Steps


def race(size: str, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The contestants of one method take turns."""
    from record import spread

    chosen = {name: what for name, what in CONTESTANTS[method].items() if what["who"] == "groundup" or arguments.python}
    with tempfile.TemporaryDirectory() as folder:
        make_models(size, Path(folder))
        common = {"method": method, "size": size, "folder": folder, "threads": arguments.threads}
        kids = {name: Contestant(what | common, arguments.python) for name, what in chosen.items()}
        for _ in range(arguments.rounds):
            for kid in kids.values():
                kid.turn()
        for kid in kids.values():
            kid.stop()
    losses = {name: kid.first_loss for name, kid in kids.items() if "bfloat16" not in name}
    assert max(losses.values()) - min(losses.values()) < 1e-3, f"they do not compute the same loss: {losses}"
    table = []
    print(f"\n{method}, {size}, loss {losses['groundup']:.5f}\n| | ms a step | times as fast |\n|---|---:|---:|")
    for name, what in chosen.items():
        row = {"contestant": name, "seconds_per_step": spread(kids[name].seconds)}
        if (theirs := kids.get(what.get("beside", ""))) is not None:
            row["times_as_fast"] = spread(theirs.seconds)["median"] / row["seconds_per_step"]["median"]
        table.append(row)
        ratio = f"{row['times_as_fast']:.2f}" if "times_as_fast" in row else ""
        print(f"| {name} | {1000 * row['seconds_per_step']['median']:.1f} | {ratio} |")
    return {"method": method, "size": size, "rows": table}


class Contestant:
    """A process that makes steps on demand."""

    def __init__(self, what: dict[str, Any], python: str | None) -> None:
        program = sys.executable if what["who"] == "groundup" or python is None else python
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if what["who"] == "groundup":
            environment["GOMP_SPINCOUNT"] = "10000"  # what the command line sets
        self._process = subprocess.Popen(
            [program, __file__, "--child", json.dumps(what)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.first_loss = self._answer()["losses"][0]
        self.seconds: list[float] = []

    def turn(self) -> None:
        """As many steps as take about a second, two at least."""
        n = max(2, round(1 / min(self.seconds))) if self.seconds else 2
        self.seconds += self._answer(n)["seconds"]

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self, n_steps: int | None = None) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if n_steps is not None:
            self._process.stdin.write(f"{n_steps}\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a contestant has ended; what it said stands above")
        return dict(json.loads(line))


def make_models(size: str, folder: Path) -> None:
    """A policy and a reference, as transformers loads them."""
    import torch

    from groundup.interop import save_model
    from groundup.model import Transformer, preset

    for seed, name in enumerate(("policy", "reference"), start=1):
        model = Transformer(preset("llama-nano", context_length=CONTEXT, **SIZES[size]))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():  # far from uniform, so that equal losses say something
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        save_model(folder / name, model)


def sequences(size: str) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts of 16 to 96 random tokens, each with two answers of 8 to 64."""
    draw = random.Random(1)
    most = SIZES[size]["vocab_size"] - 1

    def words(least: int, n: int) -> list[int]:
        return [draw.randint(3, most) for _ in range(draw.randint(least, n))]

    return [(words(16, 96), [words(8, MAX_TOKENS) for _ in range(2)]) for _ in range(ROWS)]


# In the contestants' processes


def serve(what: dict[str, Any]) -> None:
    """Make two steps, and then as many as each line of standard input says."""
    import torch

    torch.set_num_threads(what["threads"])
    if what["who"] == "groundup":  # what is imported is no memory of a step
        import torch._dynamo  # of the optimizer's first step

        import groundup.alignment.dpo
        import groundup.alignment.grpo  # noqa: F401
    if what.get("traced"):
        print(json.dumps({"bytes": traced_peak(what)}))
        return
    before = resident()
    step: Step = {"groundup": groundup_step, "trl": trl_step}[what["who"]](what)
    print(json.dumps({"losses": [step(), step()], "bytes": peak() - before}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds}), flush=True)


def groundup_step(what: dict[str, Any]) -> Step:
    """A step as `training.loop` makes it."""
    import torch

    from groundup.alignment.dpo import DPOSettings, PreferenceLoss
    from groundup.alignment.grpo import GRPO, GRPOSettings
    from groundup.alignment.lora import LoraSettings, add_adapters
    from groundup.alignment.losses import logprobs_head, sequence_logprobs
    from groundup.interop import load_model
    from groundup.recipe import resolve_optimizer
    from groundup.training import IGNORED
    from groundup.training.optimizers import Optimizers, clip_gradients
    from groundup.training.process import keep_freed_memory

    keep_freed_memory()
    precision = torch.bfloat16 if what.get("bfloat16") else torch.float32
    policy = load_model(Path(what["folder"]) / "policy")[0].requires_grad_(True)
    policy.compute_dtype = precision
    texts = sequences(what["size"])[: what.get("pairs", ROWS)]
    is_dpo = what["method"] == "dpo"
    if is_dpo:
        shape = len(texts), 2, CONTEXT
        rows = [[prompt + answer for answer in answers] for prompt, answers in texts]
    else:
        shape = ROWS, 1, CONTEXT
        rows = [[prompt + answers[0]] for prompt, answers in texts]
    width = max(len(ids) for row in rows for ids in row)
    ids, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for place, (row, (prompt, _)) in enumerate(zip(rows, texts, strict=True)):
        for side, text in enumerate(row):
            ids[place, side, : len(text)] = torch.tensor(text)
            targets[place, side, len(prompt) - 1 : len(text) - 1] = torch.tensor(text[len(prompt) :])
    ids, targets = ids[..., :width], targets[..., : width - (0 if is_dpo else 1)]

    def logprobs(model: Any) -> torch.Tensor:
        with torch.no_grad():
            inputs = ids.flatten(0, 1) if is_dpo else ids[:, 0, :-1]
            return model(inputs, head=logprobs_head(targets.flatten(0, 1))).logprobs.view_as(targets)

    reference = policy  # as a stage has it, which starts where its reference is
    if is_dpo and "pairs" not in what:
        reference = load_model(Path(what["folder"]) / "reference")[0]
        reference.compute_dtype = precision
    settings: Any
    if is_dpo:
        lora = LoraSettings(rank=8) if what.get("lora") else None
        settings = DPOSettings(beta=BETA, optimizer="adamw", lr=1e-6)
        objective: Any = PreferenceLoss(settings)
        batch = {"ids": ids, "targets": targets}
        batch["reference"] = sequence_logprobs(logprobs(reference), targets != IGNORED)
        if lora is not None:
            add_adapters(policy, lora)
    else:
        settings = GRPOSettings(rollouts=ROWS, batch_size=ROWS, aggregation="dapo", max_tokens=MAX_TOKENS, lr=1e-6)
        objective = GRPO.__new__(GRPO)  # its losses alone, without prompts to answer
        objective.settings = settings
        old = logprobs(policy)[:, 0]
        batch = {"ids": ids[:, 0], "targets": targets[:, 0], "old": old, "reference": old, "advantages": advantages()}
    policy.train()
    optimizers = Optimizers(policy, resolve_optimizer(settings), precision)

    def step() -> float:
        if what.get("reference"):
            batch["reference"] = sequence_logprobs(logprobs(reference), targets != IGNORED)
        counts = objective.counts(batch)
        terms = objective.terms({"model": policy}, batch)
        loss = sum(term.weight * term.total / counts[name] for name, term in terms.items() if term.weight)
        loss.backward()
        clip_gradients(optimizers.parameters(), 1.0)
        optimizers.step(1.0)
        return float(loss.detach())

    return step


def advantages() -> Any:
    """Of each answer; their sum is 0."""
    import torch

    return torch.tensor([1.0, -1.0] * (ROWS // 2))


def trl_step(what: dict[str, Any]) -> Step:
    """The loss of TRL's trainer, and PyTorch's fused AdamW."""
    import contextlib

    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )  # fmt: skip
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(f"{what['folder']}/{name}", dtype=torch.float32)
        for name in ("policy", "reference")
    )
    texts = sequences(what["size"])
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    common = {"output_dir": what["folder"] + "/out", "per_device_train_batch_size": ROWS, **quiet}
    if what["method"] == "dpo":
        data = Dataset.from_dict({"prompt": ["a"] * ROWS, "chosen": ["b"] * ROWS, "rejected": ["c"] * ROWS})
        config = DPOConfig(beta=BETA, **common)
        trainer: Any = DPOTrainer(policy, reference, config, train_dataset=data, processing_class=tokenizer)
        rows = [prompt + answers[side] for side in range(2) for prompt, answers in texts]
        width = max(map(len, rows))
        batch = {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        }
        lengths = [len(prompt) for prompt, _ in texts] * 2
        places = torch.arange(width)
        batch["completion_mask"] = batch["attention_mask"] * (places >= torch.tensor(lengths)[:, None])
        if not what.get("reference"):
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            with torch.no_grad():
                logits = reference(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = (-nats.sum(1)).chunk(2)
            trainer.precompute_ref_logps = True
        compute = trainer.compute_loss
    else:
        data = Dataset.from_dict({"prompt": ["a"] * ROWS})
        config = GRPOConfig(
            loss_type="dapo", beta=0.0, temperature=1.0, max_completion_length=MAX_TOKENS, num_generations=2,
            max_steps=1, **common,
        )  # fmt: skip
        trainer = GRPOTrainer(policy, lambda **_: [], args=config, train_dataset=data, processing_class=tokenizer)
        trainer.current_gradient_accumulation_steps = 1
        wide, long = max(len(prompt) for prompt, _ in texts), max(len(answers[0]) for _, answers in texts)
        batch = {
            "prompt_ids": torch.tensor([[0] * (wide - len(prompt)) + prompt for prompt, _ in texts]),
            "prompt_mask": torch.tensor([[0] * (wide - len(prompt)) + [1] * len(prompt) for prompt, _ in texts]),
            "completion_ids": torch.tensor([answers[0] + [0] * (long - len(answers[0])) for _, answers in texts]),
            "completion_mask": torch.tensor(
                [[1] * len(answers[0]) + [0] * (long - len(answers[0])) for _, answers in texts]
            ),
            "advantages": advantages(),
        }
        batch["num_items_in_batch"] = batch["completion_mask"].sum()
        compute = trainer._compute_loss
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    cast = torch.autocast("cpu", torch.bfloat16) if what.get("bfloat16") else contextlib.nullcontext()

    def step() -> float:
        with cast:
            loss = compute(policy, dict(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def resident() -> int:
    """Bytes that this process holds."""
    with open("/proc/self/statm", encoding="ascii") as status:
        return int(status.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most that this program ever held; getrusage's peak begins with what the process that started it held."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


# Rows and memory


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Fine-tuning with padded and packed rows, of the demo's and of Dolly's lengths, in turns in this process."""
    import torch
    from sft_packing import CLASSICS, VOCABULARY, Variant

    from groundup.tokenizer import Tokenizer
    from groundup.training import choose_precision
    from groundup.training.process import keep_freed_memory

    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    precision, _ = choose_precision("auto")
    texts = [json.loads(line)["text"] for line in CLASSICS.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer.train(texts, vocab_size=VOCABULARY)
    found = []
    for what, data, context in (("demo", "groundup:tasks", 256), ("Dolly", str(arguments.dolly), 512)):
        if what == "Dolly" and not arguments.dolly.is_file():
            print(f"Dolly is left out: {arguments.dolly} is not there")
            continue
        padded = {"data": (data,), "packing": False, "batch_size": 64 if what == "demo" else 32}
        packed = {"data": (data,), "batch_size": 16}  # of Dolly's as many conversations a step as padded
        variants = [Variant(settings, tokenizer, None, precision, context) for settings in (padded, packed)]
        for number in range(arguments.rounds + 2):
            for variant in variants:
                variant.step(number)
        one, other = (variant.figures() for variant in variants)
        ratio = one["seconds_per_epoch"] / other["seconds_per_epoch"]
        found.append({"lengths": what, "context": context, "padded": one, "packed": other, "times_as_fast": ratio})
        print(f"\nrows of {what}: packed {ratio:.2f} times as fast, {other['packing_efficiency']:.1%} filled")
    return found


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of a micro-batch of DPO, two pairs: all weights, and adapters of rank 8."""
    found = []
    for size in arguments.memory_sizes:
        with tempfile.TemporaryDirectory() as folder:
            make_models(size, Path(folder))
            common = {"who": "groundup", "method": "dpo", "pairs": 2, "folder": folder, "size": size}
            common["threads"] = arguments.threads
            for bfloat16 in (False, True):
                full, lora = (peaks(common | {"bfloat16": bfloat16, "lora": lora}) for lora in (False, True))
                share = {what: lora[what] / full[what] for what in full}
                precision = "bfloat16" if bfloat16 else "float32"
                found.append({"size": size, "precision": precision, "full": full, "lora": lora, "share": share})
                shown = ", ".join(
                    f"{what} {full[what] / 2**20:,.0f} MiB, with LoRA {part:.0%} of that"
                    for what, part in share.items()
                )
                print(f"DPO of {size}, {precision}: {shown}", flush=True)
    return {"date": time.strftime("%Y-%m-%d"), "threads": arguments.threads, "rows": found}


def peaks(what: dict[str, Any]) -> dict[str, int]:
    """Bytes at the fullest moment: of the tensors, and of another process that nothing records."""
    found = {}
    for name, traced in (("tensors", True), ("process", False)):
        command = [sys.executable, __file__, "--child", json.dumps(what | {"traced": traced})]
        done = subprocess.run(command, input="", stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout)["bytes"]
    return found


def traced_peak(what: dict[str, Any]) -> int:
    """Bytes of all tensors together at the fullest moment, from the loading of the model to the end of two steps."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step = groundup_step(what)
        step()
        step()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(n_bytes for _, n_bytes in changes))


if __name__ == "__main__":
    main()
