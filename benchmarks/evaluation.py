"""Benchmarks of a model: groundup beside lm-evaluation-harness (its Hugging Face backend), the same items and scores.

Both score the same folder in float32, in this process, one after the other in every round; log-likelihoods have to
agree before a time counts. Models have random weights: what they answer costs as much as what a trained one does. Needs
the extra `harness` and a folder with the benchmarks' files; 124M needs 12 GiB for the harness's logits.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from record import RESULTS, spread, write_result

import groundup as gu
from groundup.corpus import read as read_corpus
from groundup.evaluation.benchmarks import Benchmark, find_benchmark, read_items
from groundup.evaluation.lm_eval_model import task_file
from groundup.evaluation.measure import measure
from groundup.interop import load, save_model

SHAPES: dict[str, dict[str, Any]] = {
    "14M": {
        "name": "ground-1m", "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "head_dim": 64, "d_model": 384, "d_ff": 1024,
        "context_length": 1024, "vocab_size": 8192,
    },
    "124M": {"name": "gpt2"},
}  # fmt: skip
TASKS: dict[str, tuple[str, int, dict[str, Any]]] = {  # folder, worked examples, what is otherwise
    **dict.fromkeys(("arc_easy", "openbook_qa", "piqa", "winogrande", "lambada", "boolq"), ("multiple_choice", 0, {})),
    # Of one subject, whose items share their worked examples, as those of all 57 do.
    "mmlu": ("mmlu", 5, {"files": "test/high_school_biology_test.csv"}),
}


def main() -> None:
    """Measure all tasks and models, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with multiple_choice/ and mmlu/")
    parser.add_argument("--items", type=int, default=100, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="of the harness")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tasks", default=",".join(TASKS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    texts = [document.text for document in read_corpus("groundup:classics")]
    tokenizer = gu.Tokenizer.train(texts, vocab_size=8_192)
    versions = {"lm_eval": lm_eval.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    made = {"date": time.strftime("%Y-%m-%d"), "versions": versions}  # of this call; other rows may be older
    rows = []
    for shape in arguments.shapes.split(","):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            preset = gu.preset(**SHAPES[shape])
            model = gu.Transformer(preset)
            for parameter in model.parameters():
                if parameter.ndim > 1:  # no matrix of zeros, behind which a token would see itself alone
                    torch.nn.init.normal_(parameter, std=0.05)
            save_model(folder, model, tokenizer)
            for name in arguments.tasks.split(","):
                row = compare(folder, Path(place), name, arguments)
                rows.append({"shape": shape, **made, **row})
                print(
                    f"| {shape} | {name} | {row['ratio']['median']:.2f}× | {row['cpu_ratio']['median']:.2f}× |",
                    flush=True,
                )
    known = RESULTS / "evaluation.json"  # another size may be measured by another call
    before = json.loads(known.read_text(encoding="utf-8"))["rows"] if known.is_file() else []
    rows = [*{(row["shape"], row["task"]): row for row in [*before, *rows]}.values()]
    given = {name: value for name, value in vars(arguments).items() if name != "data"}
    write_result("evaluation", {**given, "n": arguments.rounds, "rows": rows})


def compare(folder: Path, place: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One task on one model, both ways, round by round; who begins alternates."""
    data, shots, otherwise = TASKS[name]
    source = find_benchmark(name).model_copy(update=otherwise)
    items = read_items(source, arguments.data / data, shots=shots, limit=arguments.items)
    told = [
        {
            "context": item.context, "contexts": item.contexts, "choices": [one.strip() for one in item.choices],
            "gold": item.gold,
        }
        for item in items
    ]  # fmt: skip
    (place / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told), encoding="utf-8")
    asked = {"context": "{{ context }}", "choices": "choices", "gold": "{{ gold }}"}
    if source.contexts:
        asked = {"contexts": "contexts", "continuation": "{{ choices[0] }}", "gold": "{{ gold }}"}
    elif source.continuation:
        asked = {"context": "{{ context }}", "continuation": "{{ choices[0] }}"}
    benchmark = Benchmark(name=name, kind="choice", files=f"{name}.jsonl", **asked)
    task = task_file(benchmark, place, place)
    manager = TaskManager(include_path=str(place), include_defaults=False)
    loaded = load(folder)
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=arguments.batch_size)
    seconds: dict[str, list[float]] = {"groundup": [], "lm_eval": []}
    cpu_seconds: dict[str, list[float]] = {"groundup": [], "lm_eval": []}
    found: dict[str, Any] = {}

    def ours() -> None:
        found["groundup"] = measure(loaded.model, tokenizer, benchmark, read_items(benchmark, place))

    def harness() -> None:
        found["lm_eval"] = lm_eval.simple_evaluate(
            model=theirs, tasks=[task.stem], task_manager=manager, bootstrap_iters=0, log_samples=True
        )["samples"][task.stem]

    both = {"groundup": ours, "lm_eval": harness}
    ours()  # what is done once in a process is no part of a round
    for turn in range(arguments.rounds):
        for who in sorted(both, reverse=bool(turn % 2)):
            start, cpu = time.perf_counter(), time.process_time()
            both[who]()
            seconds[who].append(time.perf_counter() - start)
            cpu_seconds[who].append(time.process_time() - cpu)
        check(found["groundup"], sorted(found["lm_eval"], key=lambda sample: sample["doc_id"]))
    return {
        "task": name,
        "shots": shots,
        "items": len(items),
        "ratio": ratios(seconds),
        "cpu_ratio": ratios(cpu_seconds),
        **{f"{who}_seconds": spread(values) for who, values in seconds.items()},
        **{f"{who}_cpu_seconds": spread(values) for who, values in cpu_seconds.items()},
    }


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """How many times as fast groundup is, round by round."""
    return spread([theirs / ours for ours, theirs in zip(seconds["groundup"], seconds["lm_eval"], strict=True)])


def check(records: list[dict[str, Any]], samples: list[dict[str, Any]]) -> None:
    """Both gave every choice the same log-likelihood."""
    for record, sample in zip(records, samples, strict=True):
        answers = [reply[0] for reply in sample["resps"]]
        for ours, (wanted, _) in zip(record["logprob"], answers, strict=True):
            # Theirs are sums in float32, of which very long ones hold about a millionth.
            assert abs(ours - float(wanted)) < 1e-4 + 1e-6 * abs(ours), (ours, wanted)


if __name__ == "__main__":
    main()
