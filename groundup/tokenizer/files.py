"""The files of a tokenizer, as Hugging Face names them, and the text of `tokenizer.json`."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Engine
from tokenizers.pre_tokenizers import ByteLevel

from groundup.errors import ArtifactError
from groundup.tokenizer.letters import LETTERS
from groundup.tokenizer.split import pre_tokenizer
from groundup.untrusted import file_inside, parse_object, read_bytes, reading

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
MODEL_FILE = "config.json"
VOCABULARY_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, GENERATION_FILE, "added_tokens.json", VOCABULARY_FILE,
    MERGES_FILE, "tokenizer.model", TEMPLATE_FILE, "chat_template.json",
)  # fmt: skip
"""What a tokenizer can consist of; how a text is generated also says which tokens end it."""

_MOST_IDS = 1 << 24
"""The library makes room for every id below the largest one."""
_MOST_GROWTH = 1024
"""So many characters may become of one: the normalizers that people use stay below it."""
_LARGEST_CHANGE = {"NFD": 4, "NFC": 3, "NFKD": 18, "NFKC": 18, "Lowercase": 3, "BertNormalizer": 18, "ByteLevel": 2}
_SPLITS = {"GPT2Tokenizer": "gpt2", "CodeGenTokenizer": "gpt2", "RobertaTokenizer": "gpt2", "Qwen2Tokenizer": "qwen2"}
"""How a text is cut by the tokenizers of transformers that have `vocab.json` and `merges.txt`."""


def read_files(folder: Path, names: Collection[str]) -> dict[str, bytes]:
    """The contents of those files that are there; `tokenizer.json` is made of `vocab.json` and `merges.txt` if need be.

    Raises:
        ArtifactError: one is no ordinary file of this folder, or too large.
    """
    there = [name for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    found = {name: read_bytes(file_inside(folder, name)) for name in there}
    if TOKENIZER_FILE in names and TOKENIZER_FILE not in found and {VOCABULARY_FILE, MERGES_FILE} <= found.keys():
        with reading(str(folder / VOCABULARY_FILE)):
            found[TOKENIZER_FILE] = _from_vocabulary_and_merges(found, str(folder)).encode()
    return found


def _from_vocabulary_and_merges(files: dict[str, bytes], source: str) -> str:
    """GPT-2's two files, and what stands beside them, as `tokenizer.json`."""
    config, named, more = (
        parse_object(files.get(name, b"{}"), f"{source}/{name}")
        for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE, "added_tokens.json")
    )
    made_for = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if made_for not in _SPLITS:
        raise ArtifactError(
            f"{source}/{CONFIG_FILE}: tokenizer_class = {made_for!r:.60}: not known how it cuts a text.",
            f"Save it with transformers, which writes {TOKENIZER_FILE}.",
        )
    vocabulary = parse_object(files[VOCABULARY_FILE], f"{source}/{VOCABULARY_FILE}")
    if not vocabulary.keys() >= set(LETTERS):
        raise ArtifactError(f"{source}/{VOCABULARY_FILE}: is not byte-level as GPT-2's: some bytes have no token.")
    for token, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < _MOST_IDS:
            raise ArtifactError(f"{source}/{VOCABULARY_FILE}: {token!r:.60} has the id {index!r:.40}.")
    with reading(f"{source}/{MERGES_FILE}"):
        lines = [line.split(" ") for line in files[MERGES_FILE].decode().splitlines() if line]
        merges = [(left, right) for left, right in lines if left != "#version:"]
        engine = Engine(models.BPE(vocab=vocabulary, merges=merges))
    engine.normalizer = normalizers.NFC() if _SPLITS[made_for] == "qwen2" else None
    prefixed = bool(config.get("add_prefix_space"))
    is_gpt2 = _SPLITS[made_for] == "gpt2"
    engine.pre_tokenizer = ByteLevel(add_prefix_space=prefixed) if is_gpt2 else pre_tokenizer(_SPLITS[made_for])
    engine.decoder = decoders.ByteLevel()
    added = {str(content): int(index) for content, index in more.items()}
    special: dict[str, Any] = {"<|endoftext|>": None}
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        added[token["content"]] = int(index)
        special |= {token["content"]: None} if token.get("special") else {}
    for key, value in [*named.items(), *config.items()]:
        if key.endswith("_token") and value is not None:
            special[value["content"] if isinstance(value, dict) else str(value)] = None
    added = {**{name: vocabulary[name] for name in special if name in vocabulary}, **added}
    for name, index in sorted(added.items(), key=lambda item: item[1]):
        engine.add_tokens([AddedToken(name, special=name in special, normalized=False)])
        if engine.token_to_id(name) != index:
            raise ArtifactError(
                f"{source}: the added token {name!r:.60} has the id {index}, which is not the next one."
            )
    return as_json(contents(engine))


def engine_of(spec: dict[str, Any]) -> Engine:
    """The engine of a `tokenizer.json`, without what makes the library take all memory, or panic, which it prints.

    Raises:
        ValueError: an id is too large, a merge or a table of characters is impossible, or a text could grow too long.
        Exception: whatever else the library finds wrong.
    """
    model = spec["model"]
    ids = [*model["vocab"].values()] if isinstance(model["vocab"], dict) else []
    for index in [*ids, *(token["id"] for token in spec.get("added_tokens") or [])]:
        if type(index) is not int or not 0 <= index < _MOST_IDS:
            raise ValueError(f"a token has the id {index!r:.40}")
    if mark := model.get("continuing_subword_prefix"):
        for merge in model.get("merges") or []:
            right = merge.split(" ", 1)[-1] if isinstance(merge, str) else merge[-1]
            if not right.startswith(mark):
                raise ValueError(f"a merge goes on with {right!r:.40}, which does not begin with {mark!r:.40}")
    for step in [*steps_of(spec.get("normalizer")), *steps_of(spec.get("pre_tokenizer"))]:
        table = base64.b64decode(step.get("precompiled_charsmap") or "")
        if step["type"] == "Precompiled" and not 4 <= 4 + int.from_bytes(table[:4], "little") <= len(table):
            raise ValueError("its table of characters is cut off")
        if step["type"] == "FixedLength" and step.get("length") == 0:
            raise ValueError("it cuts text into pieces of no length")
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if math.prod(map(_growth, steps_of(spec.get(part)))) > _MOST_GROWTH:
            raise ValueError(f"its {part} can make more than {_MOST_GROWTH} characters of one")
    return Engine.from_str(json.dumps(spec, ensure_ascii=False))


def steps_of(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, a pre-tokenizer or a decoder, those of sequences in sequences one by one."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders") or []
    return [step for one in inner for step in steps_of(one)]


def _growth(step: dict[str, Any]) -> float:
    """How many characters a step can make of one, at most."""
    if step["type"] == "Replace":
        found = step["pattern"].get("String")
        return max(1.0, len(step["content"]) / len(found or "1")) + (not found and len(step["content"]) > 0)
    if step["type"] == "Prepend":
        return 1 + len(step["prepend"])
    if step["type"] == "Precompiled":
        table = base64.b64decode(step["precompiled_charsmap"] or "")
        made = table[4 + int.from_bytes(table[:4], "little") :].decode("utf-8", errors="replace").split("\0")
        return max(map(len, made))
    return _LARGEST_CHANGE.get(step["type"], 1)


def contents(engine: Engine) -> dict[str, Any]:
    """What the engine would write to `tokenizer.json`."""
    spec: dict[str, Any] = json.loads(engine.to_str())
    return spec


def as_json(spec: dict[str, Any]) -> str:
    """`tokenizer.json` as text."""
    return json.dumps(spec, ensure_ascii=False, indent=2) + "\n"
