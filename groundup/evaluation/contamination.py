"""Which items of a benchmark stand in the text that a model was trained on.

Every run of 13 words of an item (8 to 13, as chosen) is looked for in the training documents, by the index that also
takes such documents out of a corpus (`corpus/decontaminate.py`); texts stream through it. Scores are then told twice:
of all items, and without those.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from groundup.corpus.decontaminate import EvaluationIndex
from groundup.corpus.reading.values import strings_of
from groundup.errors import DataError
from groundup.evaluation.benchmarks import Item

NGRAM = 13
_BATCH = 256  # documents


def contaminated_items(items: Sequence[Item], texts: Iterable[str], ngram: int = NGRAM) -> set[int]:
    """The numbers of the items that training texts repeat; of every item all strings of its row are looked for.

    Args:
        items: of one benchmark.
        texts: the training documents; read once, never held whole.
        ngram: words in a row that count as repeated; strings of fewer are looked for whole from 8 words on.

    Raises:
        DataError: `ngram` is not 8 to 13.
    """
    if not 8 <= ngram <= 13:
        raise DataError(f"contamination: n-grams of {ngram} words.", "Choose 8 to 13: shorter ones are phrases.")
    found: set[int] = set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.jsonl"
        lines = (json.dumps({"text": list(strings_of(dict(item.row)))}, ensure_ascii=False) for item in items)
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
        try:
            index = EvaluationIndex.build([path], ngram, Path(folder) / "index")
        except DataError:  # no string of enough words in any item
            return found
        stream = iter(texts)
        while batch := list(itertools.islice(stream, _BATCH)):
            for matches in index.find(batch):
                found.update(items[match.record - 1].number for match in matches)
    return found
