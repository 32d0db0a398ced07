"""llama.cpp reads our GGUF files: the same tokens, the same continuations, and what each type of weights costs.

Shapes: random models of every architecture and RoPE scaling that `export_gguf` writes, as F32; llama.cpp (with float32
keys and values) must continue three prompts greedily with our tokens, and its logits are compared at every position.
Texts: adversarial ones, tokenized by both with each split and by a vocabulary that learned from them. Types: a small
model is trained on Shakespeare; llama.cpp's predictions of held-out text from each type of file are compared with ours,
and the bytes of q8_0 and q4_0 with those of its own quantizer.

Ends with status 1 where something differs that should not. llama.cpp runs in an environment of its own, which `make
test-interop` builds.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import torch
from record import write_result

from groundup.generation import SamplingParams, generate_batch
from groundup.interop.gguf import GgufType, export_gguf
from groundup.model import RopeScaling, Transformer, preset
from groundup.tokenizer import Tokenizer, render
from groundup.tokenizer.adversarial import adversarial_texts
from groundup.tokenizer.split import PATTERNS, replace_surrogates

READER = Path(__file__).resolve().parent / "baselines" / "llama_cpp_reader.py"
N_NEW, N_TEXTS = 24, 2000
EXPERTS = {"n_experts": 4, "experts_per_token": 2}
NEO = {"attention": ("full", "window"), "window": 48, "attention_scale": 1.0, "qkv_bias": False}


def scaled(kind: str, **values: float) -> dict[str, Any]:
    """A RoPE scaling that shows within 64 tokens."""
    return {"rope_scaling": RopeScaling(kind=kind, factor=4, **values)}


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, untied, GQA": ("llama-nano", {}),
    "Llama, tied, wide heads": ("llama-nano", {"tied_embeddings": True, "head_dim": 24}),
    "Llama, biases": ("llama-nano", {"bias": True}),
    "Llama, linear scaling": ("llama-nano", scaled("linear")),
    "Llama, NTK scaling": ("llama-nano", scaled("ntk")),
    "Llama, YaRN": ("llama-nano", scaled("yarn", original_context=64)),
    "Llama, YaRN with a factor": ("llama-nano", scaled("yarn", original_context=64, attention_factor=1.4)),
    "Llama 3.1 scaling": ("llama-nano", scaled("llama3", original_context=32)),
    "Mistral, window of 48": ("llama-nano", {"attention": ("window",), "window": 48}),
    "Mixtral": ("llama-nano", EXPERTS),
    "Qwen2": ("llama-nano", {"qkv_bias": True}),
    "Qwen3, tied": ("ground-nano", {"vocab_multiple": 128}),
    "Qwen3, YaRN, untied": ("ground-nano", {"tied_embeddings": False, **scaled("yarn", original_context=64)}),
    "Qwen3, attention scale": ("ground-nano", {"attention_scale": 0.5}),
    "Qwen3, experts": ("ground-nano", EXPERTS),
    "GPT-2": ("gpt2-nano", {}),
    "GPT-2, no biases, one key head": ("gpt2-nano", {"bias": False, "n_kv_heads": 1}),
    "GPT-Neo, window of 48": ("gpt2-nano", NEO),
}
QUANTIZED = {"q8_0": 7, "q4_0": 2}
"""llama.cpp's numbers of these types of files."""
NEWER = set("\U00016d40\U000323b0\u088f\ua7ce")
"""Letters of Unicode 16 and 17 among the adversarial texts: llama.cpp's tables are of 15.1, ours know them."""
LARGEST_DIVERGENCE = {"f32": 1e-6, "f16": 1e-4, "bf16": 1e-3, "q8_0": 1e-3, "q4_0": 0.1}
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Where is the cat?\n"},
    {"role": "assistant", "content": " On the roof."},
    {"role": "user", "content": "12345 cats?"},
]


def main() -> int:
    """Write the files, let llama.cpp read them, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of an environment with llama-cpp-python")
    parser.add_argument("--steps", type=int, default=200, help="of training, for the types (default: 200)")
    arguments = parser.parse_args()
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = [*shape_jobs(folder), *text_jobs(folder), *type_jobs(folder, arguments.steps)]
        (folder / "tasks.json").write_text(json.dumps([task for task, _ in jobs]), encoding="utf-8")
        subprocess.run(
            [arguments.python, str(READER), str(folder / "tasks.json"), str(folder / "answers.json")], check=True
        )
        found = json.loads((folder / "answers.json").read_text("utf-8"))
        rows = [compare(found["answers"][task["file"]]) for task, compare in jobs]
    parts = {part: [row for row in rows if row["part"] == part] for part in ("shapes", "texts", "types")}
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))
    write_result("llama_cpp", {"llama_cpp_python": found["llama_cpp_python"], **parts})
    failed = [row for row in rows if not row["passes"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} passed.")
    return 1 if failed else 0


def shape_jobs(folder: Path) -> list[Any]:
    """One job a shape: greedy continuations, and logits at every position."""
    tokenizer = trained_tokenizer("qwen2")
    jobs = []
    for number, (shape, (name, overrides)) in enumerate(SHAPES.items()):
        model = random_model(name, vocab_size=tokenizer.vocab_size, **overrides)
        file = folder / f"shape{number}.gguf"
        told = export_gguf(model, tokenizer, file, dtype="f32")
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, tokenizer.vocab_size, (told["context_length"],), generator=generator)
        prompts = [ids[:length].tolist() for length in (1, 7, 20)]
        task = {"file": str(file), "ids": ids.tolist(), "prompts": prompts, "n_new": N_NEW}

        def compare(answer: dict[str, Any], shape=shape, model=model, ids=ids, task=task, told=told) -> dict[str, Any]:
            ours = generate_batch(model, None, task["prompts"], SamplingParams(temperature=0, max_tokens=N_NEW))
            with torch.no_grad():
                logits = model(ids[None])[0].numpy()
            theirs = np.load(f"{task['file']}.npy")
            is_same = [one.ids for one in ours] == answer["continuations"]
            return {
                "part": "shapes",
                "shape": shape,
                "architecture": told["architecture"],
                "same_continuations": is_same,
                "n_tokens": sum(len(one.ids) for one in ours),
                "positions": len(ids),
                "largest_logit_difference": float(np.abs(logits - theirs).max()),
                "deviation_of_logits": float(logits.std()),
                "passes": is_same and bool(np.abs(logits - theirs).max() < 1e-3),
            }

        jobs.append((task, compare))
    return jobs


def text_jobs(folder: Path) -> list[Any]:
    """One job a split: adversarial texts, a chat, and where the model ends."""
    jobs = []
    texts = [replace_surrogates(text) for text in adversarial_texts(N_TEXTS, seed=7)]
    for split in PATTERNS:
        tokenizer = trained_tokenizer(split)
        file = folder / f"{split}.gguf"
        export_gguf(random_model("ground-nano", vocab_size=tokenizer.vocab_size), tokenizer, file, dtype="f32")

        def compare(answer: dict[str, Any], split=split, tokenizer=tokenizer) -> dict[str, Any]:
            ours = tokenizer.encode_batch(texts)
            different = [text for text, own, theirs in zip(texts, ours, answer["tokens"], strict=True) if own != theirs]
            unexplained = [text for text in different if not NEWER & set(text)]
            chat = render(tokenizer, MESSAGES, add_generation_prompt=True).ids
            ends = sorted([tokenizer.end_of_text_id, tokenizer.end_id])
            return {
                "part": "texts",
                "split": split,
                "n_texts": len(texts),
                "n_different": len(different),
                "n_restored": sum(answer["are_restored"]),
                "n_unexplained": len(unexplained),
                "different": [ascii(text) for text in sorted(different, key=len)[:2]],
                "adds_nothing": answer["default_tokens"] == answer["tokens"][0],
                "same_chat": chat == answer["chat"],
                "same_ends": ends == answer["ends"],
                "passes": not unexplained and ends == answer["ends"] and chat == answer["chat"],
            }

        jobs.append(({"file": str(file), "texts": texts, "messages": MESSAGES}, compare))
    return jobs


def type_jobs(folder: Path, steps: int) -> list[Any]:
    """One job a type of weights: bits per token of held-out text, and how far its predictions are from ours."""
    model, held_out = trained_model(steps)
    ids = torch.tensor(held_out)
    with torch.no_grad():
        ours = model(ids[None])[0].log_softmax(dim=-1)
    jobs = []
    for dtype in get_args(GgufType):
        file = folder / f"{dtype}.gguf"
        told = export_gguf(model, None, file, dtype=dtype)
        task: dict[str, Any] = {"file": str(file), "ids": held_out, "prompts": [], "n_new": 0}
        if dtype in QUANTIZED:
            # From the first file, which is f32.
            quantize = {"file_type": QUANTIZED[dtype], "quantize_to": str(folder / f"{dtype}_by_llama_cpp.gguf")}
            jobs[0][0].setdefault("quantize", []).append(quantize)

        def compare(answer: dict[str, Any], dtype=dtype, told=told, task=task) -> dict[str, Any]:
            theirs = torch.from_numpy(np.load(f"{task['file']}.npy")).log_softmax(dim=-1)
            divergence = (ours.exp() * (ours - theirs)).sum(dim=-1)
            bits = -theirs[:-1].gather(1, ids[1:, None]).mean().item() / math.log(2)
            different = different_tensors(folder, dtype) if dtype in QUANTIZED else None
            return {
                "part": "types",
                "dtype": dtype,
                "bytes": told["bytes"],
                "bits_per_token": bits,
                "mean_divergence": divergence.mean().item(),
                "same_best_token": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
                "n_tokens": len(held_out),
                "tensors_unlike_llama_cpps": different,
                "passes": divergence.mean().item() < LARGEST_DIVERGENCE[dtype] and not different,
            }

        jobs.append((task, compare))
    return jobs


def different_tensors(folder: Path, dtype: str) -> list[str]:
    """Tensors that llama.cpp's own quantizer gives the same type and other bytes."""
    ours, theirs = (
        {one.name: one for one in gguf.GGUFReader(folder / f"{dtype}{ending}.gguf").tensors}
        for ending in ("", "_by_llama_cpp")
    )
    return [
        name
        for name, one in ours.items()
        if one.tensor_type == theirs[name].tensor_type and not np.array_equal(one.data, theirs[name].data)
    ]


def random_model(name: str, **overrides: Any) -> Transformer:
    """A model whose every weight matters: fresh ones have zero projections, which would hide faults."""
    model = Transformer(preset(name, **overrides), seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def text() -> str:
    """Shakespeare's works."""
    return resources.files("groundup").joinpath("data/shakespeare.txt").read_text("utf-8")


def trained_tokenizer(split: str) -> Tokenizer:
    """A byte-level BPE of a split; it learns from adversarial texts too, which shows where another split cuts them."""
    return Tokenizer.train([text()[:200_000], *adversarial_texts(2 * N_TEXTS, seed=1)], vocab_size=4096, split=split)


def trained_model(steps: int) -> tuple[Transformer, list[int]]:
    """A small Qwen3-shaped model that knows some English, and ids that it has not seen."""
    tokenizer = Tokenizer.train([text()[:200_000]], vocab_size=512)
    ids = torch.tensor(tokenizer.encode(text()[:1_000_000]))
    held_out, ids = ids[-256:], ids[:-256]
    model = Transformer(preset("ground-1m", vocab_size=512), seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 129, (16, 1))
        rows = ids[starts + torch.arange(129)]
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), held_out.tolist()


if __name__ == "__main__":
    sys.exit(main())
