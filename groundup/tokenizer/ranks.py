"""Byte-level BPE trained by rustbpe, two to three times as fast as Hugging Face's trainer.

rustbpe may merge another of two equally frequent pairs first, and it goes on to pairs that occur once: tokens differ
here and there, the compression does not (benchmarks/tokenization.py). It returns ranks; the merges are found again by
splitting every token with the ranks below its own, which also proves that it is a BPE.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from typing import Any

from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models

from groundup.errors import GroundupError
from groundup.tokenizer.files import contents
from groundup.tokenizer.letters import LETTERS, spelled
from groundup.tokenizer.sample import Sample
from groundup.tokenizer.special import control_token
from groundup.tokenizer.split import PATTERNS, pre_tokenizer

_N_CHECKED = 32


def require_rustbpe() -> None:
    """See that rustbpe is installed.

    Raises:
        GroundupError: it is not.
    """
    if importlib.util.find_spec("rustbpe") is None:
        raise GroundupError(
            '[tokenizer] trainer = "rustbpe": the package rustbpe is not installed.',
            "pip install 'groundup[fast]', or set trainer = \"huggingface\".",
        )


def train_rustbpe(chosen: Sample, vocab_size: int, split: str, control: list[str]) -> dict[str, Any]:
    """Train a byte-level BPE with rustbpe; the contents of `tokenizer.json`.

    Raises:
        GroundupError: what rustbpe gave is no BPE, or does not encode as it does itself.
    """
    import rustbpe

    shown: list[str] = []

    def pieces() -> Any:
        for piece in chosen.pieces():
            if len(shown) < _N_CHECKED:
                shown.append(piece)
            yield piece

    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(pieces(), vocab_size=vocab_size - len(control), pattern=PATTERNS[split])
    ranks = {bytes(token): rank for token, rank in trained.get_mergeable_ranks()}
    tokens = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in tokens] != list(range(len(tokens))) or set(map(len, tokens[: len(LETTERS)])) != {1}:
        raise _no_bpe("its ranks have holes")
    spec = _specification(tokens, merges_of(tokens, ranks), split, control)
    engine = Engine.from_str(json.dumps({**spec, "added_tokens": []}))
    to_rank = {spec["model"]["vocab"][spelled(token)]: rank for token, rank in ranks.items()}
    for piece in shown:
        if [to_rank[index] for index in engine.encode(piece).ids] != list(trained.encode(piece)):
            raise _no_bpe("it encodes otherwise than its merges say")
    return spec


def merges_of(tokens: list[bytes], ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that made each token behind the bytes.

    Args:
        tokens: by rank, the 256 bytes first.
        ranks: of the tokens.

    Raises:
        GroundupError: a token is not made of two that rank before it.
    """
    merges = []
    for rank in range(len(LETTERS), len(tokens)):
        token = tokens[rank]
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            found = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            best = min(found)
            if best >= rank:
                break
            place = found.index(best)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) != 2:
            raise _no_bpe(f"token {rank} is not made of two earlier ones")
        merges.append((parts[0], parts[1]))
    return merges


def _specification(
    tokens: list[bytes], merges: list[tuple[bytes, bytes]], split: str, control: list[str]
) -> dict[str, Any]:
    # The bytes in the order of the other trainer, which is that of their letters.
    names = [*control, *LETTERS, *(spelled(token) for token in tokens[len(LETTERS) :])]
    engine = Engine(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=[(spelled(left), spelled(right)) for left, right in merges],
        )
    )
    engine.pre_tokenizer = pre_tokenizer(split)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([control_token(name) for name in control])
    return contents(engine)


def _no_bpe(why: str) -> GroundupError:
    return GroundupError(
        f'[tokenizer] trainer = "rustbpe": what it gave is not a byte-level BPE ({why}).',
        'Set trainer = "huggingface".',
    )
