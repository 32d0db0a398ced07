"""Looking inside: what is shown is what the model computes, for every family."""

from __future__ import annotations

import base64
import threading
from pathlib import Path

import interop_models
import numpy as np
import orjson
import pytest
import torch
from generation_models import random_model, small_tokenizer

import groundup as gu
from groundup.errors import DataError
from groundup.generation import Engine, Request, SamplingParams, prompt_ids
from groundup.generation.speculative import Speculation
from groundup.tokenizer import render

SHAPES = {
    "gpt2": ("gpt2-nano", {}),
    "llama": ("llama-nano", {}),
    "own": ("ground-nano", {}),
    "window": ("ground-nano", {"attention": "window", "window": 3, "sink_tokens": 1}),
    "strided": ("ground-nano", {"attention": "strided", "stride": 3}),
    "alibi": ("ground-nano", {"position": "alibi"}),
    "sinusoidal": ("gpt2-nano", {"position": "sinusoidal"}),
    "post-norm": ("gpt2-nano", {"norm_placement": "post"}),
    "softcap": ("ground-nano", {"attention_softcap": 5.0, "logit_softcap": 9.0}),
    "experts": ("llama-nano", {"n_experts": 4, "experts_per_token": 2}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_logits_are_the_models_own_and_the_weights_are_what_its_attention_does(shape: str) -> None:
    name, fields = SHAPES[shape]
    model, tokenizer = random_model(name, **fields), small_tokenizer()
    seen = gu.inspect(model, tokenizer, "Once upon a time there was a café.")
    ids = torch.tensor([seen.ids])
    assert seen.ids == prompt_ids(tokenizer, "Once upon a time there was a café.")
    outs = {}
    hooks = [
        block.self_attn.register_forward_hook(lambda _, args, out, layer=layer: outs.__setitem__(layer, (args, out)))
        for layer, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        logits = model(ids)[0]
    for hook in hooks:
        hook.remove()
    known = [index for index in range(model.config.vocab_size) if index < tokenizer.vocab_size]
    torch.testing.assert_close(seen.logits[:, known], logits[:, known], atol=1e-5, rtol=1e-5)
    assert (seen.logits[:, tokenizer.vocab_size :] == -torch.inf).all()
    n = len(seen.ids)
    assert seen.attention.shape == (model.config.n_layers, model.config.n_heads, n, n)
    torch.testing.assert_close(seen.attention.sum(-1), torch.ones(seen.attention.shape[:3]))
    assert (seen.attention.triu(1) == 0).all()
    for layer, ((x, *_), out) in outs.items():  # weights · values, projected, are what the sub-layer gives
        own = model.blocks[layer].self_attn
        with torch.no_grad():
            values = own.v_proj(x).view(1, n, own.n_kv_heads, own.head_dim).transpose(1, 2)
            values = values.repeat_interleave(own.n_heads // own.n_kv_heads, dim=1)
            mixed = (seen.attention[layer][None] @ values).transpose(1, 2).reshape(1, n, -1)
            torch.testing.assert_close(own.o_proj(mixed), out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["Llama 2, grouped", "GPT-2", "GPT-Neo, window short"])
def test_attention_and_lens_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    theirs = interop_models.save(variant, tmp_path)
    theirs.set_attn_implementation("eager")
    ours = gu.load(tmp_path).model
    ids = interop_models.some_ids()[:1]
    with torch.no_grad():
        expected = theirs(ids, output_attentions=True, output_hidden_states=True)
        read = theirs.get_output_embeddings()
        norm = theirs.model.norm if "Llama" in variant else theirs.transformer.ln_f
        lens = [read(norm(state))[0] for state in expected.hidden_states[:-1]]
    tokenizer = _AnyTokenizer(ours.config.vocab_size)
    seen = gu.inspect(ours, tokenizer, ids[0].tolist(), top=3)  # type: ignore[arg-type]
    for layer, weights in enumerate(expected.attentions):
        torch.testing.assert_close(seen.attention[layer], weights[0], atol=1e-5, rtol=1e-4)
    for layer, logits in enumerate([*lens, expected.logits[0]]):
        for place, cell in enumerate(seen.lens[layer]):
            probabilities = logits[place].softmax(-1)
            final = int(expected.logits[0, place].argmax())
            assert cell.top[0][0] == int(logits[place].argmax())
            assert cell.probability == pytest.approx(probabilities[final].item(), abs=1e-5)
            assert cell.rank == 1 + int((logits[place] > logits[place, final]).sum())


class _AnyTokenizer:
    """Ids without texts: what transformers' random models have."""

    special_ids = frozenset[int]()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def unused_ids(self, n_ids: int) -> list[int]:
        return list(range(self.vocab_size, n_ids))

    def token_bytes(self, index: int) -> bytes:
        return b"%d " % index


def test_a_token_has_the_engines_logprob_its_rank_and_the_entropy() -> None:
    model, tokenizer = random_model(), small_tokenizer()
    ids = prompt_ids(tokenizer, "Once upon a time")
    request = Request(ids, SamplingParams(max_tokens=0), prompt_logprobs=5)
    expected = Engine(model, tokenizer).run([request])[0][0].prompt_logprobs
    seen = gu.inspect(model, tokenizer, ids, top=5)
    assert seen.tokens[0].logprob is None
    assert seen.tokens[0].top == ()
    for token, one in zip(seen.tokens[1:], expected, strict=True):
        assert token.logprob == pytest.approx(one.logprob, abs=1e-4)
        assert [index for index, _ in token.top] == [index for index, _ in one.top]
    probabilities = seen.logits[0].double().softmax(-1)
    assert seen.tokens[1].entropy == pytest.approx(-(probabilities * probabilities.log()).nansum().item(), abs=1e-4)
    assert seen.tokens[1].rank == 1 + int((probabilities > probabilities[ids[1]]).sum())
    assert [index for index, _ in seen.following] == [index for index, _ in seen.lens[-1][-1].top]


def test_a_conversation_is_read_in_the_models_layout() -> None:
    tokenizer = small_tokenizer()
    messages = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "bird"}]
    seen = gu.inspect(random_model(), tokenizer, messages)  # type: ignore[arg-type]
    assert seen.ids == render(tokenizer, messages).ids  # type: ignore[arg-type]
    assert seen.tokens[0].shown == "<|user|>"


def test_the_wire_says_the_same_in_less() -> None:
    seen = gu.inspect(random_model(), small_tokenizer(), "naïve 東")
    wire = orjson.loads(orjson.dumps(seen.to_json(position=2)))
    n = len(seen.ids)
    for layer, packed in enumerate(wire["attention"]):
        weights = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(wire["heads"], n, n) / 255
        np.testing.assert_allclose(weights, seen.attention[layer].numpy(), atol=1 / 500)
    logits = np.frombuffer(base64.b64decode(wire["next"]["logits"]), np.float32)
    usable = seen.logits[2] > -torch.inf
    np.testing.assert_array_equal(logits[usable.numpy()], seen.logits[2][usable].numpy())
    assert (logits[~usable.numpy()] < -1e29).all()
    assert wire["tokens"][-1]["bytes"].split()[-1] == f"{'東'.encode()[-1]:02x}"
    assert len(wire["lens"]) == wire["layers"] + 1
    assert seen.to_json(with_attention=False)["attention"] is None


@pytest.mark.parametrize("text", ["a b c d e f g h " * 40, [], [5, 999_999], [-1]])
def test_what_cannot_be_inspected_is_refused_by_name(text: object) -> None:
    with pytest.raises(DataError, match="text to inspect"):
        gu.inspect(random_model(), small_tokenizer(), text)  # type: ignore[arg-type]


def test_an_engine_that_uses_the_model_at_the_same_time_is_not_disturbed() -> None:
    model, tokenizer = random_model(), small_tokenizer()
    request = [Request(prompt_ids(tokenizer, "Once"), SamplingParams(max_tokens=40, seed=1)) for _ in range(2)]
    engine = Engine(model, tokenizer, is_native=False)
    expected = engine.run(request[:1])[0][0].ids
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            gu.inspect(model, tokenizer, "Once upon a time")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        assert engine.run(request[1:])[0][0].ids == expected
    finally:
        stop.set()
        thread.join()


def test_a_text_tells_what_a_draft_had_guessed_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speculation, "_n_guesses", lambda *_: 3)  # whether it pays or not
    model, tokenizer = random_model(), small_tokenizer()
    ids = prompt_ids(tokenizer, "the cat sat at the cat sat at the cat")
    engine = Engine(model, tokenizer, draft="ngrams")
    chunks = list(engine.stream(Request(ids, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))))
    tokens = [pair for chunk in chunks for pair in zip(chunk.ids, chunk.guesses, strict=True)]
    assert len(tokens) == 20
    accepted = [guesses for token, guesses in tokens if guesses == (token,)]
    rejected = [guesses for token, guesses in tokens if guesses[:1] not in ((), (token,))]
    assert len(accepted) == engine.stats.accepted_tokens > 0
    assert sum(map(len, rejected)) == engine.stats.drafted_tokens - engine.stats.accepted_tokens > 0
    plain = Engine(model, tokenizer).run([Request(ids, SamplingParams(temperature=0, max_tokens=5))])[0][0]
    assert plain.guesses == [()] * plain.n_tokens
