"""Beam search against all texts there are, and against transformers."""

import itertools

import pytest
import torch
from generation_models import random_model, random_prompts

from groundup.errors import GroundupError
from groundup.generation import SamplingParams, beam_search, generate_batch
from groundup.interop import save_model

END = 3


@torch.inference_mode()
def all_scores(model, prompt, length, penalty):
    """Every continuation that ends, or is as long as it may be."""
    vocab, found = model.config.vocab_size, {}
    for n in range(1, length + 1):
        for ids in itertools.product(range(vocab), repeat=n):
            if END in ids[:-1] or (n < length and ids[-1] != END):
                continue
            logprobs = model(torch.tensor([[*prompt, *ids]]))[0].log_softmax(-1)[len(prompt) - 1 : -1]
            total = sum(logprobs[i, token].item() for i, token in enumerate(ids))
            found[ids[:-1] if ids[-1] == END else ids] = total / n**penalty
    return found


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_with_beams_for_all_texts_the_best_is_found(penalty):
    model = random_model(vocab_size=5, std=0.3, context_length=16)
    exact = all_scores(model, [1, 2], 3, penalty)
    options = {"max_tokens": 3, "length_penalty": penalty, "stop_ids": {END}}
    found = beam_search(model, None, [1, 2], n_beams=200, **options)
    assert {tuple(one.ids): pytest.approx(one.score, abs=1e-4) for one in found} == exact
    assert tuple(found[0].ids) == max(exact, key=exact.get)


def test_one_beam_is_greedy():
    model = random_model()
    prompt = random_prompts([6], model.config.vocab_size)[0]
    greedy = generate_batch(model, None, [prompt], SamplingParams(temperature=0, max_tokens=12))[0]
    assert beam_search(model, None, prompt, n_beams=1, max_tokens=12)[0].ids == greedy.ids


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beams_are_those_of_transformers(tmp_path, penalty):
    transformers = pytest.importorskip("transformers")
    model = random_model("llama-nano", std=0.12, vocab_size=40)
    save_model(tmp_path / "model", model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for prompt in random_prompts([4, 9, 2], 40):
        expected = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
            num_beams=3, num_return_sequences=3, do_sample=False, max_new_tokens=8,
            length_penalty=penalty, eos_token_id=END, pad_token_id=0, early_stopping=False,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        found = beam_search(model, None, prompt, n_beams=3, max_tokens=8, length_penalty=penalty, stop_ids={END})
        rows = [row[len(prompt) :].tolist() for row in expected.sequences]
        rows = [row[: row.index(END)] if END in row else row for row in rows]
        assert [one.ids for one in found] == rows
        assert [one.score for one in found] == pytest.approx(expected.sequences_scores.tolist(), abs=1e-3)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(GroundupError, match="n_beams = 0"):
        beam_search(random_model(), None, [1], n_beams=0)
    with pytest.raises(GroundupError, match="a prompt has 0 tokens"):
        beam_search(random_model(), None, [])


def test_a_diverged_model_is_an_error_in_words():
    model = random_model()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(GroundupError, match="damaged, or diverged"):
        beam_search(model, None, [1, 2])
