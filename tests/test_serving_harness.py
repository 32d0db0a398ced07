"""lm-evaluation-harness gets the same numbers over HTTP as in process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from generation_models import TEXT, small_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from serving_client import Served, serving, small_model, small_state

from groundup.generation import Request, SamplingParams
from groundup.interop import save_model

pytestmark = pytest.mark.slow

WORDS = TEXT.split()
PAIRS = [
    (" ".join(WORDS[start : start + 6]), " " + " ".join(WORDS[start + 6 : start + 9])) for start in range(0, 30, 3)
]
PAIRS += [("", "Once upon"), ("naïve café", " 東京 🙂")]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(small_state()) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(path, small_model(), small_tokenizer())
    return path


def instances(kind: str, arguments: list[Any]) -> list[Any]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


@pytest.mark.parametrize(("tokenizer", "batch"), [("remote", 1), ("huggingface", 4)])
def test_log_likelihoods_are_those_of_the_engine_and_of_transformers(
    served: Served, folder: Path, tokenizer: str, batch: int
) -> None:
    over_http = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions", model="small", batch_size=batch, num_concurrent=batch,
        tokenizer_backend=tokenizer, **({} if tokenizer == "remote" else {"tokenizer": str(folder)}),
    )  # fmt: skip
    asked = instances("loglikelihood", PAIRS)
    found = over_http.loglikelihood(asked, disable_tqdm=True)
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    for (ours, greedy), (wanted, wanted_greedy) in zip(
        found, theirs.loglikelihood(asked, disable_tqdm=True), strict=True
    ):
        assert ours == pytest.approx(wanted, abs=1e-4)
        assert greedy == wanted_greedy
    # And by the engine in this process: alone in its batch to the last bit.
    for (context, continuation), (ours, _) in zip(PAIRS, found, strict=True):
        first, last = over_http._encode_pair(context, continuation) if context else (
            [small_tokenizer().end_id], small_tokenizer().encode(continuation))  # fmt: skip
        request = Request([*first, *last], SamplingParams(0, max_tokens=1), prompt_logprobs=1)
        served.engine.run([request])
        scored = request.results[0].prompt_logprobs[len(first) - 1 :]
        wanted = sum(one.logprob for one in scored)
        assert ours == (wanted if batch == 1 else pytest.approx(wanted, abs=1e-5))


def test_generations_are_those_of_the_engine(served: Served) -> None:
    over_http = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions", model="small", batch_size=2, tokenizer_backend="remote"
    )
    asked = instances("generate_until", [(text, {"until": ["\n", "."], "max_gen_toks": 12}) for text, _ in PAIRS[:4]])
    found = over_http.generate_until(asked, disable_tqdm=True)
    params = SamplingParams(0, max_tokens=12, stop=("\n", ".", "<|end|>"))
    requests = [Request(small_tokenizer().encode(text), params) for text, _ in PAIRS[:4]]
    assert found == [texts[0].text for texts in served.engine.run(requests)]
