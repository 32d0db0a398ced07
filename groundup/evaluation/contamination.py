"""Which items of benchmarks stand in the text that a model was trained on.

Every run of 13 words of an item (8 to 13, as chosen) is looked for in what the model learned from, by the index that
also takes such documents out of a corpus (`corpus/decontaminate.py`); texts stream through it once, for all benchmarks
together. Scores are then told twice: of all items, and without those.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from groundup.corpus import stream_documents
from groundup.corpus.decontaminate import EvaluationIndex
from groundup.corpus.reading.sources import find_sources
from groundup.corpus.reading.values import read_values, strings_of
from groundup.errors import ArtifactError, DataError
from groundup.evaluation.benchmarks import Item
from groundup.recipe import CorpusSettings
from groundup.run import RECIPE_FILE, Run
from groundup.stage import ancestors, graph

NGRAM = 13
_BATCH = 256  # texts


def contaminated_items(
    benchmarks: Sequence[Sequence[Item]], texts: Iterable[str], ngram: int = NGRAM
) -> list[set[int]]:
    """The numbers of the items that training texts repeat; of every item all strings of its row are looked for.

    Args:
        benchmarks: the items of each.
        texts: what was trained on; read once, never held whole.
        ngram: words in a row that count as repeated; strings of fewer are looked for whole from 8 words on.

    Returns:
        One set for each benchmark, in their order.

    Raises:
        DataError: `ngram` is not 8 to 13.
    """
    if not 8 <= ngram <= 13:
        raise DataError(f"contamination: n-grams of {ngram} words.", "Choose 8 to 13: shorter ones are phrases.")
    found: list[set[int]] = [set() for _ in benchmarks]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{place}.jsonl" for place in range(len(benchmarks))]
        for path, items in zip(paths, benchmarks, strict=True):
            lines = (json.dumps({"text": list(strings_of(dict(item.row)))}, ensure_ascii=False) for item in items)
            path.write_text("\n".join([*lines, ""]), encoding="utf-8")
        try:
            index = EvaluationIndex.build(paths, ngram, Path(folder) / "index")
        except DataError:  # no string of enough words in any item
            return found
        stream = iter(texts)
        while batch := list(itertools.islice(stream, _BATCH)):
            for match in itertools.chain.from_iterable(index.find(batch)):
                place = int(match.task)
                found[place].add(benchmarks[place][match.record - 1].number)
    return found


def training_texts(folder: Path) -> Iterator[str]:
    """What a run's model learned from: the corpus, and the files of every stage on the way to it.

    What a run cannot see is not among it: what a model made elsewhere had learned before, and shards of other runs.

    Args:
        folder: of the model, in its run: `RUN/STAGE/model`.

    Raises:
        ArtifactError: no run is around the model.
    """
    root, name = folder.resolve().parent.parent, folder.resolve().parent.name
    stages = graph(Run(root).recipe) if (root / RECIPE_FILE).is_file() else {}
    if name not in stages:
        raise ArtifactError(f"{folder}: no run is around this model: what it was trained on is not known.")
    run, before = Run(root), ancestors(stages, [name])
    if "corpus" in before:
        for document in stream_documents(run.folder("corpus"), "train"):
            yield document.text
    for stage in (stages[one] for one in sorted(before)):
        reads = getattr(stage.method, "reads", "data")  # the setting: "prompts" of distillation
        data = [one for one in getattr(stage.settings, reads, ()) if not one.startswith("groundup:")]
        for source in find_sources(data, setting=f"[{stage.section}] {reads}").files:
            for value in read_values(source, CorpusSettings(text_field=""), lambda aside: None):
                yield "\n".join(strings_of(value.data))
