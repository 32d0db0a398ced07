"""A decoder-only Transformer, GPT-2-shaped, Llama-shaped or anything between, from the same parts.

In: token ids. Out: logits. Plain single-device code: devices, precision and compilation are applied from
outside. Names follow Hugging Face's Llama, so that a checkpoint's weights need no renaming.
Sources: arXiv:1706.03762 (Transformer), GPT-2's report, arXiv:2302.13971 (Llama).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from groundup.model.attention import Attention, AttentionMask, Cached, KeyValueStore, capped
from groundup.model.config import ModelConfig
from groundup.model.cost import count_parameters
from groundup.model.documents import plan_documents
from groundup.model.experts import Experts
from groundup.model.feedforward import make_feedforward
from groundup.model.flex import plan_attention
from groundup.model.initialization import initialize
from groundup.model.linear import Linear, product
from groundup.model.masks import AttentionRule, attention_bias
from groundup.model.normalization import make_norm
from groundup.model.positions import Rotation, rotation_table, sinusoids


@dataclass(frozen=True)
class OutputLayer:
    """The output layer, for a `head` that computes something else than all logits: some rows', or a loss."""

    layer: Any  # the module that has the weights
    vocab_size: int  # tokens
    softcap: float | None = None  # of the logits, or None

    @property
    def weight(self) -> Float[Tensor, "padded_vocab d_model"]:
        """Float32; rows from `vocab_size` on are padding."""
        weight: Tensor = self.layer.weight
        return weight

    def logits(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of the tokens, float32; the products are taken in the dtype of `hidden`."""
        found = product(hidden, self.layer)[..., : self.vocab_size].float()
        return found if self.softcap is None else capped(found, self.softcap)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); with post-norm norm(x + attention(x)) and so on.

    Attributes:
        compute: `eager`, or a compiled form of it.
        recompute: activation checkpointing: in training it is called with `compute` and its arguments, so that less is
            kept for the backward pass; None: `compute` is called directly.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config, config.d_model)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config, config.d_model)
        self.mlp = make_feedforward(config)
        self.is_post_norm = config.norm_placement == "post"
        self.dropout = config.dropout
        self.compute: Callable[..., Tensor] = self.eager
        self.recompute: Callable[..., Tensor] | None = None

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        rotation: Rotation | None,
        mask: AttentionMask = None,
        cached: Cached | None = None,
        wanted: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Apply both sub-layers; of the last block only `wanted` may be, see `Transformer.forward`."""
        if wanted is not None:
            return self.eager(x, rotation, mask, cached, wanted)
        if self.recompute is not None and self.training:
            return self.recompute(self.compute, x, rotation, mask, cached)
        return self.compute(x, rotation, mask, cached)

    def eager(
        self, x: Tensor, rotation: Rotation | None, mask: AttentionMask = None, cached: Cached | None = None,
        wanted: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Both sub-layers, uncompiled."""
        told = x if self.is_post_norm else self.input_layernorm(x)
        attended = self.self_attn(told, rotation, mask, cached, wanted)
        x = x if wanted is None else x[wanted][None]  # what follows looks at each position by itself
        x = x + self._drop(attended)
        if self.is_post_norm:
            x = self.input_layernorm(x)
            return self.post_attention_layernorm(x + self._drop(self.mlp(x)))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Transformer(nn.Module):
    """The model.

    Args:
        config: its shape.
        seed: seed of the initial weights, which depend on it and on the parameters' names only.
        device: where to build it; "meta" allocates nothing and leaves the weights to `initialize`.

    Attributes:
        compute_dtype: dtype of the arithmetic; the weights stay float32.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 1, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        with torch.device(device):
            self.embed_tokens = _Embedding(config.padded_vocab_size, config.d_model)
            self.embed_positions = (
                _Embedding(config.context_length, config.d_model) if config.position == "learned" else None
            )
            self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
            self.norm = make_norm(config, config.d_model) if config.norm_placement == "pre" else None
            self.lm_head = (
                None if config.tied_embeddings else Linear(config.d_model, config.padded_vocab_size, bias=False)
            )
        self._rules = [AttentionRule.of_layer(config, layer) for layer in range(config.n_layers)]
        if torch.device(device).type != "meta":
            initialize(self, config, seed)

    @property
    def blocks(self) -> list[Block]:
        """The blocks, first to last."""
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def n_parameters(self) -> int:
        """Number of parameters; a tied embedding counts once, padding rows do not count."""
        return count_parameters(self.config)  # quantized, too

    def first_blocks(self, n_blocks: int) -> Transformer:
        """This model with its first blocks only, and the same norm and output layer; the weights are shared."""
        found = copy.copy(self)
        found._modules = {**self._modules, "layers": self.layers[:n_blocks]}
        found._rules = self._rules[:n_blocks]
        return found

    def forward(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        positions: Int[Tensor, "batch seq"] | None = None,
        documents: Int[Tensor, "batch seq"] | None = None,
        cache: KeyValueStore | None = None,
        head: Callable[[Tensor, OutputLayer], Any] | None = None,
        wanted: tuple[Int[Tensor, " n"], Int[Tensor, " n"]] | None = None,
    ) -> Any:
        """Logits of the next token at every position, in float32.

        Args:
            ids: token ids, int64.
            positions: each token's position in its row or document (default 0, 1, 2, …). With a cache, rows may
                differ.
            documents: which document of its row each token belongs to, where rows hold several, each in one piece; a
                token attends to its own only. Not with a cache.
            cache: keys and values of earlier calls; each query attends to the cached positions up to its own.
            head: computes the result from the last hidden states (batch, seq, d_model) and the output layer instead
                of logits: a loss that never holds all logits, for instance.
            wanted: rows and columns of the n positions whose results are wanted, (1, n, …); others are not computed
                where no other position needs them.
        """
        hidden = self._hidden(ids, positions, documents, cache, wanted)
        layer = self.embed_tokens if self.lm_head is None else self.lm_head
        output = OutputLayer(layer, self.config.vocab_size, self.config.logit_softcap)
        return output.logits(hidden) if head is None else head(hidden, output)

    def balance_loss(self) -> Float[Tensor, ""] | None:
        """The load-balancing loss of the last forward pass in training; None without experts.

        It is multiplied by its coefficient and the number of tokens, to be added to a loss that is summed over tokens.
        """
        found = [block.mlp.balance for block in self.layers if isinstance(block.mlp, Experts)]
        if not found or not self.training:
            return None
        return self.config.router_aux_loss_coef * torch.stack([one for one in found if one is not None]).mean()

    def _hidden(
        self,
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"] | None,
        documents: Int[Tensor, "batch seq"] | None,
        cache: KeyValueStore | None,
        wanted: tuple[Tensor, Tensor] | None,
    ) -> Float[Tensor, "batch seq d_model"]:
        config = self.config
        batch, seq = ids.shape
        if cache is not None and positions is None:
            positions = torch.arange(seq, device=ids.device).expand(batch, seq)
        cached = None if cache is None or positions is None else Cached(cache, positions)
        # Rows that all start at 0 share one table of (seq, ...) positions.
        where = torch.arange(seq, device=ids.device) if positions is None else positions
        x = self.embed_tokens(ids).to(self.compute_dtype)
        rotation: Rotation | None = None
        if self.embed_positions is not None:
            x = x + self.embed_positions(where).to(self.compute_dtype)
        elif config.position == "sinusoidal":
            x = x * config.d_model**0.5 + sinusoids(where, config.d_model).to(self.compute_dtype)
        elif config.position == "rope":
            rotation = rotation_table(where, config.rotated, config.rope_theta, self.compute_dtype, config.rope_scaling)
        if self.training and config.dropout:
            x = F.dropout(x, config.dropout)
        masks = self._attention_masks(seq, where, documents) if cached is None else {}
        experts = [block.mlp for block in self.blocks if isinstance(block.mlp, Experts)]
        for layer in experts:
            layer.takes_balance = True
        for block, rule in zip(self.layers, self._rules, strict=True):
            is_last = block is self.layers[-1]
            x = block(x, rotation, masks.get(rule), cached, wanted if is_last else None)
        for layer in experts:
            layer.takes_balance = False
        return x if self.norm is None else self.norm(x)

    def _attention_masks(
        self, seq: int, where: Int[Tensor, "*rows seq"], documents: Int[Tensor, "batch seq"] | None
    ) -> dict[AttentionRule, AttentionMask]:
        """The mask of each rule's layers; none for plain causal attention."""
        softcap = self.config.attention_softcap
        masks: dict[AttentionRule, AttentionMask] = {}
        for rule in dict.fromkeys(self._rules):
            is_plain = documents is None and where.ndim == 1 and rule.is_causal_only(seq)
            if where.is_cuda and (softcap is not None or not is_plain):
                positions = where if where.ndim == 2 else None
                masks[rule] = plan_attention(
                    rule, seq, where.device, softcap=softcap, positions=positions, documents=documents
                )
            elif documents is not None and softcap is None and not rule.alibi_heads:
                masks[rule] = plan_documents(documents, rule, self.config.n_heads, self.compute_dtype)
            elif not is_plain:
                both = None if documents is None else (documents, documents)
                masks[rule] = attention_bias(rule, where, where, self.compute_dtype, both)
        return masks


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Do nothing: see `model/initialization.py`."""
