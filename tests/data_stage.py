"""A small data stage with something for every step, and the digest of all that it leaves behind."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundup.files import file_digest

_WORDS = (
    "the be to of and that have with river stone garden window letter summer winter silver little common answer "
    "morning evening travel story people water light house mountain forest village market bridge music paper"
)
WORDS = _WORDS.split()
STAGES_FILES = {
    "corpus": ("documents.jsonl", "set_aside.jsonl", "filter_statistics.json"),
    "tokenizer": ("tokenizer.json",),
    "shards": ("manifest.json",),
}


def sentence(chance: random.Random, n_words: int = 12) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(n_words)).capitalize() + "."


def text_of(chance: random.Random, n_sentences: int = 12) -> str:
    lines = [" ".join(sentence(chance) for _ in range(3)) for _ in range(max(1, n_sentences // 3))]
    return "\n\n".join(lines)


def near_copy(text: str, chance: random.Random) -> str:
    """One word of the text is another."""
    words = text.split(" ")
    words[chance.randrange(len(words))] = "elsewhere"
    return " ".join(words)


def write_inputs(folder: Path, n: int = 400, seed: int = 1) -> list[str]:
    """Texts in several formats: exact and near copies, other languages, private data, lines that cannot be read."""
    chance = random.Random(seed)
    texts = [text_of(chance, chance.randrange(9, 30)) for _ in range(n)]
    texts += [texts[3], texts[5], texts[7], texts[7]]
    texts += [near_copy(texts[place], chance) for place in (11, 13, 17, 19)]
    french = "Le renard se promenait dans la grande forêt et cherchait quelque chose à manger avant la nuit. "
    texts += [french * 6, f"{french}Elle rentra. " * 5, "short", "Write to ann@example.org about it. " + texts[23]]
    chance.shuffle(texts)
    folder.mkdir(parents=True, exist_ok=True)
    third = len(texts) // 3
    lines = [json.dumps({"id": f"r{number % 50}", "text": text}) for number, text in enumerate(texts[:third])]
    lines[10:10] = [
        '{"text": "cut off',
        '{"title": "none"}',
        '{"text": 7}',
        '{"text": "nul \\u0000 here"}',
        '{"text": ""}',
    ]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": text}) + "\n" for text in texts[third : 2 * third])
    for number, text in enumerate(texts[2 * third :]):
        (folder / f"c{number:04d}.txt").write_text(text, encoding="utf-8")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "binary.md").write_bytes(b"\xff\xfe\x00binary")
    (folder / "cut.jsonl.gz").write_bytes((folder / "b.jsonl.gz").read_bytes()[:900])
    return texts


def write_recipe(path: Path, inputs: Path, **corpus: Any) -> Path:
    settings = {
        "inputs": [str(inputs)], "quality": ["gopher"], "privacy": ["email"], "dedup": "near",
        "dedup_within": "paragraphs", "validation_by": "document", **corpus,
    }  # fmt: skip
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    path.write_text(
        'name = "data"\nseed = 1\n[corpus]\n'
        + "\n".join(lines)
        + "\n[tokenizer]\nvocab_size = 400\n[shards]\nshard_tokens = 20000\n",
        encoding="utf-8",
    )
    return path


def digests(run: Path) -> dict[str, str]:
    """The digest of every file of the finished data stage that has a meaning outside of it."""
    names = [run / stage / name for stage, files in STAGES_FILES.items() for name in files]
    names += sorted((run / "shards").glob("*.bin")) + sorted((run / "shards").glob("*.idx"))
    return {str(path.relative_to(run)): file_digest(path) for path in names}


@contextlib.contextmanager
def not_root() -> Iterator[None]:
    """Be another user for a while: permissions do not hold for root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
