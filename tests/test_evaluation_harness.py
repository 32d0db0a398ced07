"""lm-evaluation-harness gets our numbers: from the exported folder, and through the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs pip install 'groundup[harness]'")

from generation_models import small_tokenizer  # noqa: E402
from serving_client import small_model  # noqa: E402

from groundup.evaluation.benchmarks import find_benchmark  # noqa: E402
from groundup.evaluation.lm_eval_model import GroundupLM, task_file  # noqa: E402
from groundup.evaluation.scorecard import score_model  # noqa: E402
from groundup.interop import save_model  # noqa: E402
from groundup.recipe import EvaluateSettings  # noqa: E402

pytestmark = pytest.mark.slow

N_ITEMS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(path, small_model(), small_tokenizer())
    return path


@pytest.mark.parametrize("name", ["arc_easy", "piqa", "lambada"])
def test_the_same_items_get_the_same_numbers_three_ways(
    name: str, folder: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    benchmark = find_benchmark(name)
    source = shared_data / "evaluation" / "multiple_choice" / benchmark.files
    rows = source.read_text(encoding="utf-8").splitlines()[:N_ITEMS]
    (tmp_path / benchmark.files).write_text("\n".join([*rows, ""]), encoding="utf-8")
    settings = EvaluateSettings(tasks=(name,), data=str(tmp_path))
    scores = score_model(small_model(), small_tokenizer(), settings)
    own = scores.card["tasks"][name]["figures"]
    task = task_file(benchmark, tmp_path, tmp_path)
    for model in (GroundupLM(folder), HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)):
        theirs: dict[str, Any] = lm_eval.simple_evaluate(
            model=model, tasks=[task.stem], task_manager=TaskManager(include_path=str(tmp_path)), bootstrap_iters=0,
            log_samples=True,
        )  # fmt: skip
        figures = theirs["results"][task.stem]
        assert figures["acc,none"] == own["accuracy"]["value"]
        if name == "lambada":
            assert figures["perplexity,none"] == pytest.approx(own["perplexity"]["value"], rel=1e-4)
        else:
            assert figures["acc_norm,none"] == own["accuracy_characters"]["value"]
        records = scores.records[name]
        samples = sorted(theirs["samples"][task.stem], key=lambda sample: sample["doc_id"])
        for record, sample in zip(records, samples, strict=True):
            logprobs = [float(reply[0]) for reply in sample["filtered_resps"]] if name != "lambada" else [
                float(sample["filtered_resps"][0])
                if not isinstance(sample["filtered_resps"][0], list | tuple)
                else float(sample["filtered_resps"][0][0])
            ]  # fmt: skip
            assert record["logprob"] == pytest.approx(logprobs, rel=1e-6, abs=1e-4)  # theirs are sums in float32
