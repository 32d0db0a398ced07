"""One contestant of benchmarks/training_speed.py: a model, a loss, an optimizer, and steps on demand.

Runs in an environment of its own (groundup is imported by groundup's contestants only). Reads lines of JSON on standard
input, {"steps": n}, and answers with the seconds of each step and the losses; {"stop": true} ends it. Every step is
forward, backward, clipping to norm 1 and AdamW on the same tokens.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[Tensor, Tensor], float]
AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


def main() -> None:
    """Build what the first argument says, then serve."""
    what = json.loads(sys.argv[1])
    torch.set_num_threads(what.get("threads", 2))
    device = what.get("device", "cpu")
    torch.manual_seed(0)
    began = time.perf_counter()
    step = {"nanogpt": plain, "transformers": transformers, "litgpt": litgpt, "groundup": groundup}[what["who"]](what)
    shape = what["shape"]
    stream = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, shape["vocab"], (what["rows"], shape["length"] + 1), generator=stream).to(device)
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    warm = [step(ids, targets) for _ in range(2)]
    answer({"ready": time.perf_counter() - began, "losses": warm, "parameters": what["parameters"]})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.get("stop"):
            return
        seconds, losses = [], []
        for _ in range(asked["steps"]):
            start = time.perf_counter()
            losses.append(step(ids, targets))
            seconds.append(time.perf_counter() - start)
        answer({"seconds": seconds, "losses": losses, "peak_bytes": peak_bytes(device)})


def answer(value: Any) -> None:
    """One line of JSON."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def peak_bytes(device: str) -> int:
    """The most memory held: the process's resident set, or what was allocated on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status", encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


class Block(nn.Module):
    """A block as nanoGPT has it (MIT licence; written anew after its description: GPT-2 with biases)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then feed-forward."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class PlainGPT(nn.Module):
    """The plain PyTorch loop's model: GPT-2's shape, tied embeddings, all logits at once."""

    def __init__(self, vocab: int, layers: int, heads: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scale = 1 / math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def plain(what: dict[str, Any]) -> Step:
    """nanoGPT's model in a plain loop."""
    shape = what["shape"]
    model = PlainGPT(shape["vocab"], shape["layers"], shape["heads"], shape["width"], shape["length"])
    return looped(model, model, what)


def transformers(what: dict[str, Any]) -> Step:
    """A Llama of transformers, or its GPT-2."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    shape = what["shape"]
    if what["model"] == "gpt":
        config = GPT2Config(vocab_size=shape["vocab"], n_layer=shape["layers"], n_head=shape["heads"],
                            n_embd=shape["width"], n_positions=shape["length"], resid_pdrop=0.0, embd_pdrop=0.0,
                            attn_pdrop=0.0, use_cache=False)  # fmt: skip
    else:
        config = LlamaConfig(vocab_size=shape["vocab"], num_hidden_layers=shape["layers"],
                             num_attention_heads=shape["heads"], num_key_value_heads=shape.get("kv_heads"),
                             hidden_size=shape["width"], intermediate_size=shape["inner"],
                             max_position_embeddings=shape["length"], tie_word_embeddings=shape.get("tied", True),
                             use_cache=False)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        # shift_labels: targets that are shifted already, as transformers' own Trainer hands them for long sequences.
        return model(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss

    return looped(model, loss, what)


def litgpt(what: dict[str, Any]) -> Step:
    """A Llama of litgpt, with the loss of its pretraining."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    shape = what["shape"]
    heads, width = shape["heads"], shape["width"]
    config = Config(
        name="same", block_size=shape["length"], vocab_size=shape["vocab"], padded_vocab_size=shape["vocab"],
        n_layer=shape["layers"], n_head=heads, n_query_groups=shape.get("kv_heads") or heads, n_embd=width,
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP", intermediate_size=shape["inner"],
    )  # fmt: skip
    model = GPT(config)
    if shape.get("tied", True):
        model.lm_head.weight = model.transformer.wte.weight
    model.apply(lambda module: nn.init.normal_(module.weight, std=0.02) if hasattr(module, "in_features") else None)
    nn.init.normal_(model.transformer.wte.weight, std=0.02)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return chunked_cross_entropy(model(ids), targets, chunk_size=0)

    return looped(model, loss, what, whole=False)


def looped(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], what: dict[str, Any], whole: bool = True
) -> Step:
    """The loop that all peers share: autocast where bfloat16 is asked for, clipping, AdamW.

    Args:
        model: whose parameters are trained.
        loss: of ids and targets.
        what: the contestant.
        whole: compile model and loss as one; else the model alone.
    """
    device = what.get("device", "cpu")
    model.to(device)
    what["parameters"] = sum(p.numel() for p in model.parameters())
    if what.get("compile"):
        if whole:
            loss = torch.compile(loss)
        else:
            model.compile()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    fused = True if what.get("fused") or device == "cuda" else None
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=fused)

    def step(ids: Tensor, targets: Tensor) -> float:
        with torch.autocast(device, torch.bfloat16, enabled=what["precision"] == "bfloat16"):
            value = loss(ids, targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return step


def groundup(what: dict[str, Any]) -> Step:
    """Groundup's own step, as `training.loop` makes it."""
    from groundup.console import Console
    from groundup.model import ModelConfig, Transformer
    from groundup.recipe import OptimizerSettings
    from groundup.training import head_loss
    from groundup.training.compilation import CompiledBlocks
    from groundup.training.optimizers import Optimizers, clip_gradients
    from groundup.training.process import keep_freed_memory

    shape = what["shape"]
    heads, width = shape["heads"], shape["width"]
    fields: dict[str, Any] = {"vocab_size": shape["vocab"], "context_length": shape["length"],
              "n_layers": shape["layers"], "n_heads": heads, "n_kv_heads": shape.get("kv_heads") or heads,
              "head_dim": width // heads, "d_model": width, "tied_embeddings": shape.get("tied", True)}  # fmt: skip
    if what["model"] == "gpt":
        fields |= {"d_ff": 4 * width, "activation": "gelu", "norm": "layernorm", "position": "learned", "bias": True,
                   "norm_eps": 1e-5, "qk_norm": False}  # fmt: skip
    else:
        fields |= {"d_ff": shape["inner"], "activation": "swiglu", "qk_norm": False}
    device = torch.device(what.get("device", "cpu"))
    if not what.get("plain_memory") and device.type == "cpu":
        keep_freed_memory()
    model = Transformer(ModelConfig(**fields)).to(device)
    model.compute_dtype = torch.bfloat16 if what["precision"] == "bfloat16" else torch.float32
    settings = OptimizerSettings(optimizer=what.get("optimizer", "adamw"), lr=3e-4, weight_decay=0.1)
    optimizers = Optimizers(model, settings, model.compute_dtype)
    if what.get("compile"):
        CompiledBlocks(model, Console())
    what["parameters"] = model.n_parameters
    if "take" in what:
        what["take"]({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    def step(ids: Tensor, targets: Tensor) -> float:
        loss = model(ids, head=head_loss(targets))
        (loss.objective / targets.numel()).backward()
        clip_gradients(optimizers.parameters(), 1.0)
        optimizers.step(1.0)
        return float(loss.nats) / targets.numel()

    return step


if __name__ == "__main__":
    main()
