# ruff: noqa: E501
"""What the API gives for every field, and what it says of what is wrong."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import schemathesis
import torch
from generation_models import TEXT, small_tokenizer
from hypothesis import HealthCheck, Phase, given, settings
from lengths import examples
from serving_client import Served, serving, small_model, small_state

from groundup.generation import Request, SamplingParams, prompt_ids
from groundup.serving.page import routes
from groundup.tokenizer import render

CHAT = "/v1/chat/completions"
TALK = [{"role": "user", "content": "Where is the cat?"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(small_state("small", "other"), routes()) as server:
        yield server


def logprobs_of(ids: list[int]) -> torch.Tensor:
    """Of each token behind the first, by the model itself: (seq - 1, vocab)."""
    with torch.inference_mode():
        return small_model()(torch.tensor([ids]))[0, :-1].log_softmax(dim=-1)


def test_echo_scores_the_prompt_as_the_model_does(served: Served) -> None:
    ids = small_tokenizer().encode(TEXT)[:40]
    _, found, _ = served.ask(
        "/v1/completions", {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "seed": 1}
    )
    (choice,) = found["choices"]
    scores = choice["logprobs"]
    assert scores["token_logprobs"][0] is None
    assert len(scores["tokens"]) == 41
    expected = logprobs_of(ids)
    chosen = expected.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert scores["token_logprobs"][1:40] == pytest.approx(chosen.tolist(), abs=1e-4)
    # How lm-evaluation-harness asks whether a token was the most probable one: by equal floats.
    greedy = [
        one == max(top.values())
        for one, top in zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True)
    ]
    assert greedy[:39] == (expected.argmax(dim=-1) == torch.tensor(ids[1:])).tolist()
    assert sum(greedy) < 40
    text = small_tokenizer().decode(ids, skip_special=False)
    assert choice["text"].startswith(text)
    for token, place in zip(scores["tokens"][:40], scores["text_offset"], strict=False):
        assert token.startswith("bytes:") or choice["text"].startswith(token, place)


def test_a_token_that_ends_the_text_is_seen_where_one_token_is_asked_for(served: Served) -> None:
    """lm-evaluation-harness drops the last token of what it gets: it must not be the prompt's."""
    end = small_tokenizer().end_of_text_id
    asked = {"prompt": [5, 9, 11], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0,
             "logit_bias": {str(end): 100}}  # fmt: skip
    choice = served.ask("/v1/completions", asked)[1]["choices"][0]
    assert choice["logprobs"]["ids"] == [5, 9, 11, end]
    assert (choice["finish_reason"], len(choice["logprobs"]["token_logprobs"])) == ("stop", 4)
    plain = served.ask("/v1/completions", {**asked, "logprobs": None, "echo": None, "max_tokens": 5})[1]
    assert (plain["choices"][0]["text"], plain["usage"]["completion_tokens"]) == ("", 0)


def test_a_prompt_can_be_scored_without_writing(served: Served) -> None:
    asked = {"prompt": ["Once", "The old cat"], "max_tokens": 0, "echo": True, "logprobs": 0}
    found = served.ask("/v1/completions", asked)[1]
    for choice, prompt in zip(found["choices"], asked["prompt"], strict=True):
        assert choice["text"] == prompt
        ids = choice["logprobs"]["ids"]
        assert ids == prompt_ids(small_tokenizer(), prompt)
        wanted = logprobs_of(ids).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
        assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"][1:])
    assert found["usage"]["completion_tokens"] == 0


def test_several_texts_of_several_prompts_are_in_order_and_seeded(served: Served) -> None:
    asked = {"prompt": ["Once", "The cat"], "n": 2, "max_tokens": 6, "seed": 3}
    found = served.ask("/v1/completions", asked)[1]["choices"]
    assert [choice["index"] for choice in found] == [0, 1, 2, 3]
    requests = [Request(prompt_ids(small_tokenizer(), prompt), SamplingParams(n=2, max_tokens=6, seed=3))
                for prompt in asked["prompt"]]  # fmt: skip
    wanted = [text.text for texts in served.engine.run(requests) for text in texts]
    assert [choice["text"] for choice in found] == wanted
    assert served.ask("/v1/completions", {**asked, "seed": -(2**63)})[0] == 200


def test_a_stream_has_the_whole_texts_logprobs_and_offsets(served: Served) -> None:
    asked = {"prompt": "Once", "max_tokens": 12, "seed": 4, "logprobs": 2}
    whole = served.ask("/v1/completions", asked)[1]["choices"][0]["logprobs"]
    *events, last = served.events("/v1/completions", asked)
    assert last == "[DONE]"
    pieces = [event["choices"][0]["logprobs"] for event in events]
    assert {key: [one for piece in pieces if piece for one in piece[key]] for key in whole} == whole


@pytest.mark.parametrize("stream", [False, True])
def test_writing_stops_before_a_stop_text(served: Served, stream: bool) -> None:
    plain = served.ask("/v1/completions", {"prompt": "Once", "max_tokens": 20, "seed": 8, "ignore_eos": True})[1][
        "choices"
    ][0]["text"]
    stop = plain[5:8]
    asked = {"prompt": "Once", "max_tokens": 20, "seed": 8, "ignore_eos": True, "stop": [stop]}
    if stream:
        choices = [event["choices"][0] for event in served.events("/v1/completions", asked)[:-1]]
        text, reason = "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]
    else:
        choice = served.ask("/v1/completions", asked)[1]["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
    assert (text, reason) == (plain[: plain.index(stop)], "stop")


def test_a_text_ends_where_the_context_does(served: Served) -> None:
    asked = {"prompt": [5] * 1000, "max_tokens": 10**6, "ignore_eos": True}
    found = served.ask("/v1/completions", asked)[1]
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["total_tokens"] == 1024 + 1  # the last token is written and not read


def test_chat_logprobs_hold_bytes_and_alternatives(served: Served) -> None:
    asked = {"messages": TALK, "max_tokens": 5, "seed": 1, "logprobs": True, "top_logprobs": 3}
    whole = served.ask(CHAT, asked)[1]["choices"][0]["logprobs"]["content"]
    assert len(whole) == 5
    for entry in whole:
        assert bytes(entry["bytes"]) == small_tokenizer().token_bytes(entry["id"])
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] <= 0
    events = served.events(CHAT, asked)
    streamed = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert [entry for one in streamed if one for entry in one["content"]] == whole


def test_content_may_be_parts_and_null_is_absent(served: Served) -> None:
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]},
        *TALK,
    ]
    plain = [{"role": "system", "content": "Be\nkind.", "name": None, "tool_calls": None}, *TALK]
    both = [served.ask(CHAT, {"messages": turns, "max_tokens": 8, "temperature": 0, "stop": None, "user": None})[1]
            for turns in (parts, plain)]  # fmt: skip
    assert both[0]["choices"] == both[1]["choices"]


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ({"type": "json_object"}, lambda value: isinstance(value, dict)),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"enum": ["a", "b"]}}},
         lambda value: value in ("a", "b")),
    ],
)  # fmt: skip
def test_response_format_is_kept(served: Served, wanted: dict[str, Any], fits: Any) -> None:
    asked = {"messages": TALK, "max_tokens": 200, "response_format": wanted, "seed": 1}
    choice = served.ask(CHAT, asked)[1]["choices"][0]
    assert choice["finish_reason"] == "length" or fits(json.loads(choice["message"]["content"]))


def test_embeddings_are_mean_hidden_states_of_length_one(served: Served) -> None:
    ids = prompt_ids(small_tokenizer(), "The cat sat")
    with torch.inference_mode():
        hidden = small_model()(torch.tensor([ids]), head=lambda states, _: states)[0].mean(dim=0)
    wanted = (hidden / hidden.norm()).numpy()
    status, found, _ = served.ask("/v1/embeddings", {"input": ["The cat sat", "a bird"]})
    assert status == 200
    assert [one["index"] for one in found["data"]] == [0, 1]
    np.testing.assert_allclose(found["data"][0]["embedding"], wanted, atol=1e-6)
    coded = served.ask("/v1/embeddings", {"input": ids, "encoding_format": "base64"})[1]["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded), np.float32), wanted, atol=1e-6)


def test_tokens_and_texts(served: Served) -> None:
    tokenizer = small_tokenizer()
    found = served.ask("/tokenize", {"prompt": "naïve 東京 🙂", "add_special_tokens": False})[1]
    assert found["tokens"] == tokenizer.encode("naïve 東京 🙂")
    assert found["count"] == len(found["tokens"])
    assert served.ask("/detokenize", {"tokens": found["tokens"]})[1] == {"prompt": "naïve 東京 🙂"}
    assert served.ask("/tokenize", {"prompt": "Once"})[1]["tokens"] == prompt_ids(tokenizer, "Once")
    assert served.ask("/tokenize", {"prompt": "<|endoftext|>"})[1]["tokens"] == [tokenizer.end_of_text_id]
    assert tokenizer.end_of_text_id not in served.ask(
        "/tokenize", {"prompt": "a <|endoftext|>", "add_special_tokens": False})[1]["tokens"]  # fmt: skip
    talk = served.ask("/tokenize", {"messages": TALK})[1]["tokens"]
    assert talk == render(tokenizer, TALK, add_generation_prompt=True).ids
    assert served.ask("/tokenizer_info")[1]["eos_token"] == "<|end|>"


def test_health_metrics_and_models(served: Served) -> None:
    assert served.ask("/health")[0] == served.ask("/ready")[0] == 200
    before = served.engine.stats.new_tokens
    served.ask("/v1/completions", {"prompt": "Once", "max_tokens": 7, "ignore_eos": True})
    text = served.ask("/metrics")[1].decode()
    assert f'groundup_generation_tokens_total{{model="small"}} {before + 7:.1f}' in text
    assert 'groundup_requests_running{model="small"} 0.0' in text
    assert 'groundup_requests_total{endpoint="/v1/completions",status="200"}' in text
    assert 'groundup_ttft_seconds_count{model="small"}' in text
    status, found, _ = served.ask("/v1/models/other")
    assert (status, found["id"], found["max_model_len"]) == (200, "other", 1024)


LONG = "the cat " * 2000
WRONG: dict[str, tuple[str, Any, int, str | None, str]] = {
    "not JSON": (CHAT, b"{", 400, None, "not JSON"),
    "NaN": (CHAT, b'{"messages": [], "temperature": NaN}', 400, None, "not JSON"),
    "Infinity": ("/v1/completions", b'{"prompt": "a", "temperature": 1e999}', 400, None, "not JSON"),
    "half a character": ("/v1/completions", b'{"prompt": "\\ud800"}', 400, None, "not JSON"),
    "not UTF-8": ("/v1/completions", b'{"prompt": "\xff"}', 400, None, "not JSON"),
    "very deep": ("/v1/completions", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None, "not JSON"),
    "deep": ("/v1/completions", b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "prompt", "prompt"),
    "a list": (CHAT, [], 400, None, "valid dictionary"),
    "nothing asked": (CHAT, {}, 400, "messages", "required"),
    "no messages": (CHAT, {"messages": []}, 400, "messages", "at least 1"),
    "an unknown field": (CHAT, {"messages": TALK, "chat_template": "{{ 1 }}"}, 400, "chat_template", "not supported"),
    "arguments of a template": (CHAT, {"messages": TALK, "chat_template_kwargs": {}}, 400, "chat_template_kwargs", "not s"),
    "several of the best": ("/v1/completions", {"prompt": "a", "best_of": 2}, 400, "best_of", "not supported"),
    "a suffix": ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix", "not supported"),
    "an image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content", ""),
    "a wrong role": (CHAT, {"messages": [{"role": "king", "content": "a"}]}, 400, "messages.0.role", "role"),
    "a number as text": (CHAT, {"messages": TALK, "temperature": "1"}, 400, "temperature", "number"),
    "truth as a number": (CHAT, {"messages": TALK, "n": True}, 400, "n", "n:"),
    "below zero": (CHAT, {"messages": TALK, "temperature": -0.1}, 400, "temperature", "greater than or equal to 0"),
    "no mass": (CHAT, {"messages": TALK, "top_p": 0}, 400, "top_p", "greater than 0"),
    "too many texts": (CHAT, {"messages": TALK, "n": 100_000}, 400, "n", "less than or equal to 128"),
    "too many texts of prompts": ("/v1/completions", {"prompt": ["a"] * 100, "n": 2}, 400, "n", "at most 128"),
    "too many prompts": ("/v1/completions", {"prompt": ["a"] * 129}, 400, "prompt", "at most 128"),
    "too many stops": (CHAT, {"messages": TALK, "stop": ["a"] * 17}, 400, "stop", "at most 16"),
    "too many alternatives": (CHAT, {"messages": TALK, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "20"),
    "alternatives of nothing": (CHAT, {"messages": TALK, "top_logprobs": 2}, 400, None, "needs logprobs"),
    "a bias on a word": (CHAT, {"messages": TALK, "logit_bias": {"cat": 1}}, 400, "logit_bias.cat", "pattern"),
    "a bias on no token": (CHAT, {"messages": TALK, "logit_bias": {"99999": 1}}, 400, None, "token id 99999"),
    "options of no stream": (CHAT, {"messages": TALK, "stream_options": {"include_usage": True}}, 400, None, "stream"),
    "two limits": (CHAT, {"messages": TALK, "max_tokens": 1, "max_completion_tokens": 1}, 400, None, "the same"),
    "a prompt of nothing": ("/v1/completions", {"prompt": []}, 400, "prompt", "prompt"),
    "no tokens": ("/v1/completions", {"prompt": [[]]}, 400, "prompt", "prompt"),
    "no such token": ("/v1/completions", {"prompt": [320]}, 400, "prompt", "token id 320"),
    "a token below zero": ("/v1/completions", {"prompt": [-1]}, 400, "prompt", "prompt"),
    "a long prompt": ("/v1/completions", {"prompt": LONG}, 400, "prompt", "maximum context length is 1024"),
    "a long talk": (CHAT, {"messages": [{"role": "user", "content": LONG}]}, 400, "messages", "maximum context length"),
    "a streamed echo with scores": ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, 400,
                                    "stream", "echo"),
    "a schema of nothing": (CHAT, {"messages": TALK, "response_format": {"type": "json_schema"}}, 400, "response_format",
                            "belongs to"),
    "a schema that cannot be held": (CHAT, {"messages": TALK, "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": {"not": {"type": "string"}}}}}, 400, None, "not"),
    "a schema that is nested too deeply": (CHAT, {"messages": TALK, "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": json.loads('{"items": ' * 300 + "{}" + "}" * 300)}}}, 400, None, "recursion"),
    "a schema that nothing fits": (CHAT, {"messages": TALK, "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": False}}}, 400, "response_format.json_schema.schema", "schema"),
    "nobody's tool": (CHAT, {"messages": TALK, "tool_choice": "required"}, 400, None, "needs tools"),
    "another tool": (CHAT, {"messages": TALK, "tools": [{"type": "function", "function": {"name": "a"}}], "tool_choice": {
        "type": "function", "function": {"name": "b"}}}, 400, None, "names no function"),
    "arguments that are not JSON": (CHAT, {"messages": [*TALK, {"role": "assistant", "tool_calls": [
        {"id": "a", "function": {"name": "f", "arguments": "{"}}]}]}, 400, None, "JSON object"),
    "a long text to embed": ("/v1/embeddings", {"input": LONG}, 400, "input", "maximum context length"),
    "no token to embed": ("/v1/embeddings", {"input": [320]}, 400, "input", "0 to 319"),
    "other dimensions": ("/v1/embeddings", {"input": "a", "dimensions": 8}, 400, "dimensions", "not supported"),
    "two things to tokenize": ("/tokenize", {"prompt": "a", "messages": TALK}, 400, None, "prompt or messages"),
    "a token that is none": ("/detokenize", {"tokens": [320]}, 400, None, "320"),
    "a model that is not there": (CHAT, {"messages": TALK, "model": "x"}, 404, "model", "none of this name"),
    "a path as a model": (CHAT, {"messages": TALK, "model": "../../etc/passwd"}, 404, "model", "none of this name"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_with_its_name_and_its_code(served: Served, what: str) -> None:
    path, body, status, param, said = WRONG[what]
    found_status, found, _ = served.ask(path, body)
    assert (found_status, *found) == (status, "error"), found
    error = found["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert said in error["message"]
    assert error["param"] == param, error
    assert len(error["message"]) < 600


def test_other_content_types_methods_and_addresses(served: Served) -> None:
    assert served.ask(CHAT, {"messages": TALK}, headers={"Content-Type": "text/plain"})[0] == 415
    assert served.ask(CHAT)[0] == 405
    assert served.ask("/v1/nothing")[1]["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_the_openapi_document_holds(served: Served, mode: schemathesis.GenerationMode) -> None:
    """Generated requests give no 5xx, nothing undocumented, no answer that breaks its schema; wrong ones are refused."""
    checks = schemathesis.checks
    checks.load_all_checks()
    wanted = [checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
              checks.response_schema_conformance, checks.negative_data_rejection]  # fmt: skip
    refused = {"checks": {"negative_data_rejection": {"expected-statuses": ["4XX"]}}}  # 413 is not in its own list
    config = schemathesis.Config.from_dict(refused)
    n_operations = 0
    for found in schemathesis.openapi.from_url(f"{served.url}/openapi.json", config=config).get_all_operations():
        operation, n_operations = found.ok(), n_operations + 1
        if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing can be wrong

        @settings(max_examples=examples(12), phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(mode))
        def holds(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=wanted)

        holds()
    assert n_operations == 15


def test_the_openapi_document_has_null_where_it_means_nothing(served: Served) -> None:
    """Clients send back what they were sent, null in fields that this server does not know."""
    turns = [{"role": "assistant", "content": "It is here.", "refusal": None, "audio": None}, *TALK]
    assert served.ask(CHAT, {"messages": turns, "max_tokens": 1, "functions": None})[0] == 200
    for name, schema in served.ask("/openapi.json")[1]["components"]["schemas"].items():
        assert schema["additionalProperties"] == {"type": "null"}, name
        for field in schema["properties"].keys() - set(schema.get("required", ())):
            kinds = [one.get("type") for one in schema["properties"][field].get("anyOf", [{"type": "null"}])]
            assert "null" in kinds, (name, field)


def test_scores_are_numbers_that_json_has(served: Served) -> None:
    asked = {"prompt": "Once", "max_tokens": 3, "logprobs": 3, "logit_bias": {str(one): -100 for one in range(7, 300)}}
    scores = served.ask("/v1/completions", asked)[1]["choices"][0]["logprobs"]
    assert all(math.isfinite(one) for one in scores["token_logprobs"])
