"""A tokenizer as llama.cpp reads it: tokens, their types, merges, and the name of the split.

In: any tokenizer that writes Hugging Face's files. llama.cpp carries no regexes in its files, it knows some by name;
byte-level BPE with one of the three that groundup offers can be exported. A tokenizer that only resembles one of them
is refused: it would tokenize text wrongly without an error.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Engine

from groundup.errors import ArtifactError
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.pretrained import PretrainedTokenizer
from groundup.tokenizer.special import CHAT_TEMPLATE
from groundup.tokenizer.split import PATTERNS, pre_tokenizer
from groundup.untrusted import reading

_NAMES = {
    ("qwen2", False): "qwen2",
    ("gpt2", False): "gpt-2",
    ("llama3", True): "llama-bpe",
    ("llama3", False): "smaug-bpe",
}
"""llama.cpp's name by split, and by whether a word that is a token is taken whole without looking at the merges."""

_GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


def vocabulary_of(tokenizer: Tokenizer | None, n_rows: int, out: Path) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer, by the names of the writer's methods without `add_`.

    Args:
        tokenizer: the model's, groundup's or a pretrained one; None: the file takes ids only.
        n_rows: vocabulary size of the model; ids beyond the tokenizer's become unused tokens.
        out: the file to be, for error messages.

    Raises:
        ArtifactError: llama.cpp would tokenize otherwise, or the model is smaller than the vocabulary.
    """
    if tokenizer is None:
        return {"tokenizer_model": "none"}
    template: str | None = CHAT_TEMPLATE
    # Documents follow one another in training, so what ends one stands before the next.
    if isinstance(tokenizer, PretrainedTokenizer):
        template, known = tokenizer.chat_templates.get("default"), tokenizer.special_token_ids
    else:
        known = {"bos": [tokenizer.end_of_text_id], "eos": [tokenizer.end_id], "pad": [tokenizer.pad_id]}
    eos_id, pad_id = (next(iter(known[name]), None) for name in ("eos", "pad"))
    bos_id = next(iter(known["bos"]), eos_id)
    with reading(f"{out}: the tokenizer"):
        engine = Engine.from_str(tokenizer.contents)
        spec = json.loads(engine.to_str())  # one spelling of what several versions of the format say
        split = _split_of(spec, out)
        tokens, types = _tokens_of(spec, n_rows, out)  # bytes in GPT-2's letters, control tokens as they are called
        added = engine.encode("").ids  # what begins and ends every encoded text
        values = {
            "tokenizer_model": "gpt2",
            "tokenizer_pre": split,
            "token_list": tokens,
            "token_types": types,
            "token_merges": [one if isinstance(one, str) else " ".join(one) for one in spec["model"]["merges"]],
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "pad_token_id": pad_id,
            "add_bos_token": bos_id is not None and added[:1] == [bos_id],
            "add_eos_token": eos_id is not None and added[1:] == [eos_id],
            # Without transformers' generation marks, which not every reader of GGUF knows: conditions that always
            # hold stand for them, so that white space around the tags is trimmed as before.
            "chat_template": template and _GENERATION_TAG.sub(_as_condition, template),
        }
    return {name: value for name, value in values.items() if value is not None}


def _as_condition(tag: re.Match[str]) -> str:
    return tag[1] + ("endif" if tag[2] else "if true") + tag[3]


def _split_of(spec: dict[str, Any], out: Path) -> str:
    model = spec["model"]
    if model["type"] != "BPE":
        raise ArtifactError(
            f"{out}: a {model['type']} tokenizer has no place in a GGUF file.",
            'Train a byte-level BPE: [tokenizer] kind = "bpe".',
        )
    odd = [
        f"model.{field} = {model[field]!r}"
        for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if model.get(field)
    ]
    if spec["normalizer"] not in (None, {"type": "NFC"}):
        odd.append(f"normalizer: {spec['normalizer']['type']}")
    split = next((name for name in PATTERNS if _is_split(spec["pre_tokenizer"], name)), None)
    takes_whole_words = bool(model.get("ignore_merges"))
    if split is None:
        odd.append("pre_tokenizer: neither qwen2's nor Llama 3's nor GPT-2's")
    elif (split, takes_whole_words) not in _NAMES:
        odd.append(f"model.ignore_merges = {takes_whole_words} with the split of {split}")
    if odd or split is None:
        raise ArtifactError(
            f"{out}: byte-level BPE with a split that llama.cpp knows can be written as GGUF, and this tokenizer is "
            f"another ({'; '.join(odd)}).",
            "For SentencePiece's (Llama 2, Mistral) export with --to hf and convert that folder by llama.cpp's own "
            "convert_hf_to_gguf.py.",
        )
    return _NAMES[split, takes_whole_words]


def _is_split(found: dict[str, Any] | None, name: str) -> bool:
    """Whether a pre-tokenizer of a `tokenizer.json` cuts as ours of this name does."""

    def essence(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: essence(part) for key, part in value.items() if key != "trim_offsets"}
        return [essence(part) for part in value] if isinstance(value, list) else value

    ours = json.loads(pre_tokenizer(name).__getstate__())
    return essence(found) == essence(ours)


def _tokens_of(spec: dict[str, Any], n_rows: int, out: Path) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    names = {index: (token, TokenType.NORMAL) for token, index in spec["model"]["vocab"].items()}
    for token in spec["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        names[token["id"]] = (token["content"], kind)
    if max(names) >= n_rows:
        raise ArtifactError(
            f"{out}: the tokenizer has {max(names) + 1} tokens, the model {n_rows}.",
            "Export the model with the tokenizer that it was trained with.",
        )
    taken = {name for name, _ in names.values()}
    for index in range(n_rows):
        if index not in names:
            filler = f"[PAD{index}]"
            while filler in taken:
                filler += "_"
            names[index] = (filler, TokenType.UNUSED)
    tokens, types = zip(*(names[index] for index in range(n_rows)), strict=True)
    return list(tokens), [int(kind) for kind in types]
