"""What 8 and 4 bits cost a trained model, and how much of it GPTQ wins back; and what products of integers gain.

Trains a model of 14M parameters on the demo's text, or takes a run (`--run`). Quality does not depend on how busy the
machine is; the products' times are CPU seconds of one thread, the forms in turn.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from record import spread, write_result
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import groundup as gu
from groundup.alignment.quantization import run_text
from groundup.evaluation.metrics import bits_and_bytes, ratio_estimate
from groundup.generation.quantize import Quantization, QuantizedLinear, quantize
from groundup.generation.rounding import round_to_nearest
from groundup.model import Transformer

RECIPE = """
[corpus]
inputs = ["groundup:classics"]
languages = ["en"]
dedup = "exact"
[tokenizer]
vocab_size = 8192
[model]
n_layers = 6
n_heads = 6
n_kv_heads = 6
head_dim = 64
d_model = 384
d_ff = 1024
context_length = 256
[pretrain]
tokens = 1_000_000
batch_size = 8
"""
INT8, INT4 = Quantization(8), Quantization(4)
KINDS: dict[str, tuple[Quantization, str]] = {
    "int8, a scale a row": (INT8, "rtn"),
    "int8, a scale a row, activations int8": (Quantization(8, activations="int8"), "rtn"),
    "int8, a scale for 32": (Quantization(8, 32), "rtn"),
    "int4 as Q4_0 rounds": (INT4, "q4_0"),
    "int4, best scale": (INT4, "rtn"),
    "int4, GPTQ": (INT4, "gptq"),
}
ROWS = (1, 8, 128, 512)


def main() -> None:
    """Train or load, quantize, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a run with a pretrained model (default: one is built)")
    parser.add_argument("--work", type=Path, default=Path("runs/quantize-benchmark"))
    parser.add_argument("--windows", type=int, default=128, help="of the calibration")
    arguments = parser.parse_args()
    run = arguments.run
    if run is None:
        run = gu.build(gu.parse_recipe(RECIPE, "quantize-benchmark"), arguments.work, only=["pretrain"]).root
    loaded = gu.load(run, stage="pretrain")
    model, tokenizer = loaded.model.requires_grad_(False), loaded.tokenizer
    assert tokenizer is not None
    length = model.config.context_length
    texts, calibration = run_text(loaded.folder, tokenizer, (arguments.windows, length))
    assert calibration is not None
    bits, n_bytes = bits_and_bytes(model, texts, tokenizer)
    ids = torch.tensor(tokenizer.encode("".join(texts)))[: 20 * length]
    windows = ids[: len(ids) // length * length].view(-1, length)
    quality = {}
    for name, (kind, method) in KINDS.items():
        start = time.process_time()
        changed = quantized(model, kind, method, calibration)
        seconds = time.process_time() - start
        after, _ = bits_and_bytes(changed, texts, tokenizer)
        change = ratio_estimate(after - bits, n_bytes)
        quality[name] = {
            "bits_per_byte_change": change.value,
            "stderr": change.stderr,
            **divergence(model, changed, windows),
            "cpu_seconds": seconds,
        }
        print(name, quality[name], flush=True)
    loss = {name: found["bits_per_byte_change"] for name, found in quality.items()}
    best = loss["int4, GPTQ"]
    values = {
        "parameters": model.n_parameters,
        "trained_tokens": gu.Run(run).manifest("pretrain").summary["tokens"],
        "bits_per_byte": ratio_estimate(bits, n_bytes).value,
        "calibration_windows": arguments.windows,
        "quality": quality,
        "won_back_of_q4_0": 1 - best / loss["int4 as Q4_0 rounds"],
        "won_back_of_best_scale": 1 - best / loss["int4, best scale"],
        "products_ms": products(),
    }
    print({name: value for name, value in values.items() if name != "quality"})
    write_result("quantize", values)


def quantized(model: Transformer, kind: Quantization, method: str, calibration: Tensor) -> Transformer:
    """A quantized copy."""
    changed = copy.deepcopy(model)
    if method != "q4_0":
        return quantize(changed, kind, method=method, calibration=calibration)  # type: ignore[arg-type]
    q4 = gguf.GGMLQuantizationType.Q4_0
    for name, (n_bits, size) in kind.matrices({n: tuple(p.shape) for n, p in model.named_parameters()}).items():
        weight = changed.get_parameter(f"{name}.weight")
        if n_bits == 4:
            weight.data = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), q4), q4))
        else:
            values, scales = round_to_nearest(weight, 8, size)
            weight.data = values.float() * scales.float()
    return changed


@torch.inference_mode()
def divergence(model: Transformer, changed: Transformer, windows: Tensor) -> dict[str, float]:
    """KL from the model to the changed one, in nats a token, and how often both find the same token most probable."""
    kl, same = [], []
    for part in windows.split(4):
        before, after = model(part).log_softmax(-1), changed(part).log_softmax(-1)
        kl.append((before.exp() * (before - after)).sum(-1).flatten())
        same.append((before.argmax(-1) == after.argmax(-1)).flatten())
    both = torch.cat(kl)
    return {
        "kl_mean": float(both.mean()),
        "kl_999": float(np.quantile(both.numpy(), 0.999)),
        "same_top_1": float(torch.cat(same).float().mean()),
    }


@torch.inference_mode()
def products(d_out: int = 2048, d_in: int = 768, rounds: int = 15) -> dict[str, Any]:
    """CPU milliseconds of one product with a (d_out, d_in) matrix, the forms in turn."""
    torch.set_num_threads(1)
    linear = nn.Linear(d_in, d_out, bias=False)
    values, scales = round_to_nearest(linear.weight, 8, d_in)
    weights_only, both = (QuantizedLinear(values, scales, 8).eval() for _ in range(2))
    both.rounds_activations = True
    ao = nn.Sequential(copy.deepcopy(linear)).eval()
    quantize_(ao, Int8DynamicActivationInt8WeightConfig())
    half = linear.weight.bfloat16()
    found: dict[str, Any] = {}
    for n_rows in ROWS:
        x = torch.randn(n_rows, d_in)
        x_half = x.bfloat16()
        forms: dict[str, Callable[[], Tensor]] = {
            "float32": lambda x=x: linear(x),
            "bfloat16": lambda x=x_half: F.linear(x, half),
            "int8 weights, dequantized": lambda x=x: weights_only(x),
            "int8 weights and activations": lambda x=x: both(x),
            "torchao, int8 weights and activations": lambda x=x: ao(x),
        }
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(rounds):
            for name, form in forms.items():
                start = time.process_time()
                form()
                times[name].append((time.process_time() - start) * 1e3)
        found[f"{n_rows} rows"] = {name: spread(measured) for name, measured in times.items()}
    return found


if __name__ == "__main__":
    main()
