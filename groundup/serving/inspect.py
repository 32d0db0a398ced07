"""What a model computes on the way to its next token: probabilities, logit lens, attention.

    seen = gu.inspect(model, tokenizer, "Once upon a time")
    seen.tokens[3].logprob, seen.tokens[3].top      # what the model held of each token, and what it would have said
    seen.attention[layer, head]                     # (seq, seq): each row sums to 1
    seen.lens[layer][position].top                  # what that layer would say next

The logit lens (nostalgebraist, 2020) reads every layer with the model's last norm and output layer. `to_json` is what
`POST /inspect` answers with.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from groundup.errors import DataError
from groundup.generation import prompt_ids
from groundup.model import Transformer
from groundup.model.transformer import Block, OutputLayer
from groundup.tokenizer import Message, Tokenizer, render
from groundup.tokenizer.pieces import piece_of

MOST_TOKENS = 128
LENS_TOP = 5


@dataclass(frozen=True)
class SeenToken:
    """A token of the text, and what the model held of it before it came.

    Attributes:
        id: its id.
        shown: its text, every character visible; bytes that are a part of a character as `⟨e2 82⟩`.
        bytes: its bytes, in hex; none for a control token.
        logprob: its log-probability in nats; None for the first token, which nothing comes before. `-logprob` is its
            surprisal.
        rank: 1 for the token that was most probable here; None as above.
        entropy: of the distribution that it was one of, in nats; None as above.
        top: the most probable tokens here and their probabilities, the most probable first.
    """

    id: int
    shown: str
    bytes: str
    logprob: float | None
    rank: int | None
    entropy: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class LensCell:
    """What one layer would say behind one token.

    Attributes:
        top: the most probable next tokens and their probabilities.
        probability: that this layer gives to the token that the last layer finds most probable.
        rank: of that token in this layer; 1: most probable.
    """

    top: tuple[tuple[int, float], ...]
    probability: float
    rank: int


@dataclass(frozen=True)
class Inspection:
    """A text as the model sees it.

    Attributes:
        ids: of the text; of a plain text with the `<|endoftext|>` that a document begins behind.
        tokens: one for each id.
        following: the most probable tokens behind the last one, and their probabilities.
        lens: for each layer, the embedding first and the model's output last, one cell for each token.
        attention: float32, each row sums to 1; on the CPU.
        logits: float32, the model's own, −inf for ids that stand for no token; on the CPU.
        tokenizer: of the model.
    """

    ids: list[int]
    tokens: list[SeenToken]
    following: tuple[tuple[int, float], ...]
    lens: list[list[LensCell]]
    attention: Float[Tensor, "layers heads seq seq"]
    logits: Float[Tensor, "seq vocab"]
    tokenizer: Tokenizer

    def to_json(self, *, position: int = -1, with_attention: bool = True) -> dict[str, Any]:
        """Plain values; probabilities rounded to 6 digits, attention as uint8 and logits as float32 in base64.

        Args:
            position: whose next token's logits are given whole, all others' only as their most probable tokens.
            with_attention: give the attention of every layer and head, `heads · seq²` bytes a layer.
        """
        names: dict[int, str] = {}

        def named(top: Sequence[tuple[int, float]]) -> list[list[int | str | float]]:
            for index, _ in top:
                names.setdefault(index, piece_of(self.tokenizer, index).shown)
            return [[index, names[index], round(probability, 6)] for index, probability in top]

        logits = self.logits[position].contiguous()
        best = [(index, 0.0) for index in logits.topk(min(64, len(logits))).indices.tolist()]
        return {
            "ids": self.ids,
            "tokens": [
                {
                    "id": token.id, "text": token.shown, "bytes": token.bytes, "rank": token.rank,
                    "logprob": _rounded(token.logprob), "entropy": _rounded(token.entropy), "top": named(token.top),
                }
                for token in self.tokens
            ],
            "following": named(self.following),
            "lens": [
                [{"top": named(cell.top), "p": round(cell.probability, 6), "rank": cell.rank} for cell in layer]
                for layer in self.lens
            ],
            "layers": self.attention.shape[0],
            "heads": self.attention.shape[1],
            "attention": [_base64(_as_bytes(layer)) for layer in self.attention] if with_attention else None,
            "next": {
                "position": position % len(self.ids),
                "logits": _base64(logits.nan_to_num(neginf=-1e30)),
                "names": {str(index): text for index, text, _ in named(best)},
            },
        }  # fmt: skip


@torch.no_grad()
def inspect(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str | Sequence[Message] | Sequence[int],
    *,
    top: int = 10,
    most_tokens: int = MOST_TOKENS,
) -> Inspection:
    """Compute a text once, and keep what is on the way.

    Args:
        model: put into evaluation mode; not changed. On the way to its logits every layer's attention is computed a
            second time with explicit weights.
        tokenizer: of the model.
        text: a plain text, which is read as the beginning of a document; a conversation, in the model's own layout; or
            token ids.
        top: alternatives that are kept for each token.
        most_tokens: longer texts are refused: attention takes layers · heads · tokens² numbers.

    Raises:
        DataError: the text is empty or too long, or has an id that the model does not have.
    """
    if isinstance(text, str):
        ids = prompt_ids(tokenizer, text)
    elif text and not isinstance(text[0], int):
        ids = render(tokenizer, text).ids  # type: ignore[arg-type]
    else:
        ids = list(text)  # type: ignore[arg-type]
    config = model.config
    most = min(most_tokens, config.context_length)
    if not ids or len(ids) > most:
        raise DataError(f"the text to inspect has {len(ids)} tokens: it must have 1 to {most}.", "Give a part of it.")
    if wrong := [index for index in ids if not 0 <= index < config.vocab_size]:
        raise DataError(f"the text to inspect has the token id {wrong[0]}: ids go from 0 to {config.vocab_size - 1}.")
    layers = [_Watched(block) for block in model.eval().blocks]
    # Modules of our own around shared blocks: whoever else uses the model at this time sees nothing of it.
    watched = model.first_blocks(config.n_layers)
    watched.layers = nn.ModuleList(layers)
    unused = tokenizer.unused_ids(config.vocab_size)
    device = model.embed_tokens.weight.device
    states, output = watched(torch.tensor([ids], device=device), head=lambda hidden, output: (hidden, output))
    before = [layer.before if model.norm is None else model.norm(layer.before) for layer in layers]
    logits = _logits(output, states, unused)
    logprobs = logits.log_softmax(dim=-1)
    best = logits.topk(min(top, config.vocab_size), dim=-1).indices
    tops = _pairs(best, logprobs.exp())
    pieces = [piece_of(tokenizer, index) for index in ids]
    following = torch.tensor(ids[1:])[:, None]
    own = logprobs[:-1].gather(-1, following)
    ranks = (1 + (logits[:-1] > logits[:-1].gather(-1, following)).sum(dim=-1)).tolist()
    entropies = torch.special.entr(logprobs.exp()).sum(dim=-1).tolist()
    tokens = [
        SeenToken(
            piece.id, piece.shown, piece.bytes, own[place - 1].item() if place else None,
            ranks[place - 1] if place else None, entropies[place - 1] if place else None,
            tops[place - 1] if place else (),
        )
        for place, piece in enumerate(pieces)
    ]  # fmt: skip
    lens = [_lens(_logits(output, hidden, unused), best[:, :1]) for hidden in before]
    return Inspection(
        ids, tokens, tops[-1], [*lens, _lens(logits, best[:, :1])],
        torch.stack([layer.weights for layer in layers]), logits, tokenizer,
    )  # fmt: skip


class _Watched(nn.Module):
    """A block that keeps its input, and its attention's weights."""

    before: Tensor
    weights: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, rotation: Any, mask: Any, cached: Any, wanted: None) -> Tensor:
        block = self.block
        self.before = x
        inputs = x if block.is_post_norm else block.input_layernorm(x)
        self.weights = block.self_attn.weights(inputs, rotation)[0].cpu()
        return block.eager(x, rotation, mask, cached)


def _logits(output: OutputLayer, hidden: Tensor, unused: list[int]) -> Float[Tensor, "seq vocab"]:
    logits = output.logits(hidden)[0].cpu()
    logits[:, unused] = -torch.inf
    return logits


def _lens(logits: Float[Tensor, "seq vocab"], chosen: Tensor) -> list[LensCell]:
    probabilities = logits.softmax(dim=-1)
    tops = _pairs(logits.topk(min(LENS_TOP, logits.shape[-1]), dim=-1).indices, probabilities)
    held = logits.gather(-1, chosen)
    ranks = (1 + (logits > held).sum(dim=-1)).tolist()
    of_chosen = probabilities.gather(-1, chosen)[:, 0].tolist()
    return [LensCell(*cell) for cell in zip(tops, of_chosen, ranks, strict=True)]


def _pairs(ids: Tensor, probabilities: Tensor) -> list[tuple[tuple[int, float], ...]]:
    values = probabilities.gather(-1, ids)
    return [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(max(value, -1e30), 6)


def _as_bytes(weights: Float[Tensor, "heads seq seq"]) -> Tensor:
    return (weights * 255).round().to(torch.uint8)


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.numpy().tobytes()).decode()
