"""All initialization, in one place.

| parameter                                   | `scaled` (default)          | `gpt2`                         |
|---------------------------------------------|-----------------------------|--------------------------------|
| token and position embeddings               | N(0, 0.02)                  | N(0, 0.02)                     |
| projections into a sub-layer (q k v gate up)| N(0, 1/sqrt(fan-in))        | N(0, 0.02)                     |
| routers of experts                          | N(0, 0.02)                  | N(0, 0.02)                     |
| projections back to the stream (o down)     | 0: a block starts as x → x  | N(0, 0.02 / sqrt(2 · layers))  |
| output layer, where untied                  | 0: uniform prediction       | N(0, 0.02)                     |
| norm weights / all biases                   | 1 / 0                       | 1 / 0                          |
| rows that fill up the vocabulary            | 0                           | 0                              |

Each parameter is drawn on the CPU from a generator of its own, seeded by (seed, name): the weights do not
depend on the order of construction, the number of devices or how the model is sharded.
Sources: GPT-2's report, section 2.3; zero projections as in arXiv:1901.09321 (Fixup).
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
import xxhash
from torch import Tensor, nn

from groundup.model.config import ModelConfig

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_EMBEDDING_STD = 0.02


def expected_initial_loss(config: ModelConfig) -> float:
    """Cross-entropy of a fresh model in nats, for targets that have nothing to do with their inputs.

    ln V, but for a tied output layer. There, where blocks start as x → x, a token's own logit is not small: its row
    times itself, which with rows of N(0, s) and a stream normalized to 1 is s · width, and

        loss = ln((V − 1) · exp(s² · width / 2) + exp(s · width))

    which beyond a width of some hundreds is nats above ln V. (Smaller rows would begin at ln V and learn more slowly:
    benchmarks/LOG.md.)
    """
    vocabulary, width, std = config.vocab_size, config.d_model, _EMBEDDING_STD
    if not config.tied_embeddings or config.initialization != "scaled":
        return math.log(vocabulary)
    token, position = std, 0.0
    if config.position == "learned":
        position = std
    elif config.position == "sinusoidal":
        token, position = std * math.sqrt(width), math.sqrt(0.5)
    own = std * width * token / math.hypot(token, position)
    if config.logit_softcap is not None:
        own = config.logit_softcap * math.tanh(own / config.logit_softcap)
    others = math.log(vocabulary - 1) + std**2 * width / 2
    return max(own, others) + math.log1p(math.exp(-abs(own - others)))


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter exactly once, sharded (DTensor) or not."""
    for name, parameter in model.named_parameters():
        name = name.replace("_orig_mod.", "")
        full = _draw(name, tuple(parameter.shape), config, seed)
        if is_sharded(parameter):
            from torch.distributed.tensor import distribute_tensor

            # Every rank draws the same full tensor, so no broadcast is needed: each keeps its shard.
            parameter.copy_(
                distribute_tensor(
                    full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            )
        else:
            parameter.copy_(full)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a `DTensor`; of none, its module, which takes as long to load as torch, is never loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _draw(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """A parameter's initial value, float32, from its name's generator."""
    std = standard_deviation(name, shape, config.initialization, config.n_layers)
    if std is None:
        return torch.ones(shape)
    if std == 0.0:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()) >> 1)
    if name.startswith(("embed_tokens.", "lm_head.")):
        filled = torch.zeros(shape)  # the tokens' rows do not depend on how many follow that are none
        filled[: config.vocab_size] = torch.randn((config.vocab_size, shape[1]), generator=generator) * std
        return filled
    return torch.randn(shape, generator=generator) * std


def standard_deviation(name: str, shape: tuple[int, ...], scheme: str, n_layers: int) -> float | None:
    """The table above: the standard deviation for a parameter, or None for a norm's weight of ones."""
    part = name.rsplit(".", 1)[0].rsplit(".", 1)[-1]
    if name.endswith("bias"):
        return 0.0
    if part in ("embed_tokens", "embed_positions", "router"):
        return _EMBEDDING_STD
    if part.endswith("norm"):
        return None
    if scheme == "gpt2":
        return 0.02 / math.sqrt(2 * n_layers) if part in ("o_proj", "down_proj") else 0.02
    if part in ("o_proj", "down_proj", "lm_head"):
        return 0.0
    assert part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), f"no initialization for {name}"
    return 1.0 / math.sqrt(shape[-1])
