"""Clients that people have, unmodified, get what the engine gives: OpenAI's, LangChain's, curl."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from typing import Literal

import langchain_core.messages
import langchain_core.tools
import langchain_openai
import openai
import pydantic
import pytest
from generation_models import small_tokenizer
from serving_client import Served, serving, small_model, small_state

from groundup.generation import Engine, Request, SamplingParams, prompt_ids
from groundup.tokenizer import render

QUESTION = [{"role": "user", "content": "Where is the cat?"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(small_state("small", "other", keys=["secret-key"])) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret-key", max_retries=0, timeout=60)


def expected(ids: list[int], params: SamplingParams, seed: int = 0) -> str:
    return Engine(small_model(seed), small_tokenizer(), slots=4).run([Request(ids, params)])[0][0].text


def test_openai_gets_the_engines_answer_whole_and_streamed(client: openai.OpenAI) -> None:
    ids = render(small_tokenizer(), QUESTION, add_generation_prompt=True).ids
    for name, weights in (("small", 0), ("other", 1)):
        asked = {"model": name, "messages": QUESTION, "max_tokens": 20, "temperature": 0.7, "seed": 5}
        wanted = expected(ids, SamplingParams(0.7, max_tokens=20, seed=5), weights)
        whole = client.chat.completions.create(**asked)
        assert (whole.choices[0].message.content, whole.model, whole.choices[0].finish_reason) == (
            wanted,
            name,
            "length",
        )
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 20)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
        assert chunks[-1].choices == []
        assert chunks[-1].usage == whole.usage


def test_openai_completes_texts_and_ids_several_at_once(client: openai.OpenAI) -> None:
    params = SamplingParams(0, max_tokens=8)
    prompts = ["Once upon", "In the house"]
    wanted = [expected(prompt_ids(small_tokenizer(), prompt), params) for prompt in prompts]
    asked = {"model": "small", "temperature": 0, "max_tokens": 8}
    found = client.completions.create(prompt=prompts, **asked)
    assert [choice.text for choice in found.choices] == wanted
    ids = [prompt_ids(small_tokenizer(), prompt) for prompt in prompts]
    assert [choice.text for choice in client.completions.create(prompt=ids, **asked).choices] == wanted
    assert client.completions.create(prompt=ids[0], **asked).choices[0].text == wanted[0]
    texts = ["", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **asked):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == wanted


def test_openai_async_streams_many_at_once(served: Served) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(
            model="small", messages=QUESTION, max_tokens=12, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="secret-key", timeout=60) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(12)))

    ids = render(small_tokenizer(), QUESTION, add_generation_prompt=True).ids
    wanted = [expected(ids, SamplingParams(max_tokens=12, seed=seed)) for seed in range(12)]
    assert asyncio.run(all_of_them()) == wanted


class Cat(pydantic.BaseModel):
    colour: Literal["black", "white"]
    lives: Literal[7, 9]


def test_openai_parses_structured_answers(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(model="small", messages=QUESTION, response_format=Cat, seed=1)
    assert isinstance(found.choices[0].message.parsed, Cat)
    with client.chat.completions.stream(model="small", messages=QUESTION, response_format=Cat, seed=1) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == found.choices[0].message.parsed


def test_openai_gets_a_forced_tool_call_whole_and_streamed(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Cat, name="look_at")
    choice = {"type": "function", "function": {"name": "look_at"}}
    asked = {"model": "small", "messages": QUESTION, "tools": [tool], "tool_choice": choice, "seed": 2}
    found = client.chat.completions.parse(**asked).choices[0]
    call = found.message.tool_calls[0]
    assert (found.finish_reason, call.function.name, len(call.id)) == ("tool_calls", "look_at", 9)
    assert isinstance(call.function.parsed_arguments, Cat)
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    turns = [*QUESTION, found.message, {"role": "tool", "tool_call_id": call.id, "content": "It is there."}]
    assert client.chat.completions.create(model="small", messages=turns, max_tokens=2).choices  # as it was answered


def test_openai_sees_models_embeddings_and_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small", "other"]
    assert client.models.retrieve("other").id == "other"
    texts = ["The cat", "the birds"]
    found = client.embeddings.create(model="small", input=texts)  # asks for base64
    floats = client.embeddings.create(model="small", input=texts, encoding_format="float")
    for one, other in zip(found.data, floats.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding)
        assert sum(value * value for value in one.embedding) == pytest.approx(1)
    with pytest.raises(openai.NotFoundError, match="there is none of this name"):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature") as raised:
        client.chat.completions.create(model="small", messages=QUESTION, temperature=-1)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError, match="a key is needed"):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError, match="audio: is not supported"):
        client.chat.completions.create(model="small", messages=QUESTION, audio={"voice": "x", "format": "wav"})


def test_langchain_answers_streams_and_calls_tools(served: Served) -> None:
    chat = langchain_openai.ChatOpenAI(
        base_url=f"{served.url}/v1", api_key="secret-key", model="small", temperature=0, max_tokens=64, timeout=60
    )
    ids = render(small_tokenizer(), [{"role": "system", "content": "Be kind."}, *QUESTION],
                 add_generation_prompt=True).ids  # fmt: skip
    turns = [
        langchain_core.messages.SystemMessage("Be kind."),
        langchain_core.messages.HumanMessage(QUESTION[0]["content"]),
    ]
    wanted = expected(ids, SamplingParams(0, max_tokens=64))
    assert chat.invoke(turns).content == wanted
    assert "".join(chunk.content for chunk in chat.stream(turns)) == wanted
    assert isinstance(chat.with_structured_output(Cat).invoke(turns), Cat)
    assert isinstance(chat.with_structured_output(Cat, method="function_calling").invoke(turns), Cat)


def test_curl_streams(served: Served) -> None:
    body = json.dumps({"prompt": "Once", "max_tokens": 3, "stream": True, "seed": 1})
    command = ["curl", "-sSN", f"{served.url}/v1/completions", "-d", body, "-H", "Content-Type: application/json",
               "-H", "Authorization: Bearer secret-key"]  # fmt: skip
    lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split("\n\n")
    assert len(lines) == 5
    assert lines[3:] == ["data: [DONE]", ""]
    assert [json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"] for line in lines[:3]] == [
        None, None, "length"
    ]  # fmt: skip
