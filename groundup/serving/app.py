"""The application: which address is answered by what, from its start to the end of its last answer.

POST /v1/chat/completions, /v1/completions, /v1/embeddings     as OpenAI's (`completions`, `embeddings`)
GET  /v1/models, /v1/models/{name}
POST /tokenize, /detokenize; GET /tokenizer_info                as vLLM's, which lm-evaluation-harness asks for
GET  /health, /ready, /metrics, /openapi.json
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp

from groundup.generation import prompt_ids
from groundup.serving.completions import Wakeups, chat_completions, completions
from groundup.serving.openapi import document
from groundup.serving.protocol import (
    APIError,
    DetokenizeBody,
    EmbeddingsBody,
    TokenizeBody,
    check_connected,
    json_response,
    read_body,
)
from groundup.serving.security import Protection
from groundup.serving.state import ServedModel, State
from groundup.tokenizer import special
from groundup.tokenizer.pretrained import PretrainedTokenizer


def make_app(state: State, pages: Sequence[BaseRoute] = ()) -> ASGIApp:
    """The server as an ASGI application, its engines started while it runs.

    Args:
        state: its models and limits.
        pages: further routes, for people; those that are not under / and /page/ need a key as the API does.
    """
    routes = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        *pages,
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[dict[str, Any]]:
        """Engines take steps from the first request to the last; uvicorn has let all of them finish when this ends."""
        engines = [one.engine for one in state.models.values()]
        for engine in engines:
            engine.start()
        try:
            yield {"server": state, "wakeups": Wakeups(asyncio.get_running_loop()), "reading": asyncio.Lock()}
        finally:
            for engine in engines:
                await asyncio.to_thread(engine.stop)

    # Starlette's own application would put two more layers around every chunk of a stream.
    return Protection(Router(routes, lifespan=lifespan), state)


async def models(http: Request) -> Response:
    """GET /v1/models."""
    return json_response({"object": "list", "data": [_model(one) for one in http.state.server.models.values()]})


async def one_model(http: Request) -> Response:
    """GET /v1/models/NAME."""
    return json_response(_model(http.state.server.find(http.path_params["name"])))


def _model(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name, "object": "model", "created": served.created, "owned_by": "groundup",
        "max_model_len": served.engine.length,
    }  # fmt: skip


async def embeddings(http: Request) -> Response:
    """POST /v1/embeddings: the mean of the last hidden states (behind the last norm) over a text, of length 1."""
    body = EmbeddingsBody.model_validate(await read_body(http))
    served: ServedModel = http.state.server.find(body.model)
    texts = await asyncio.to_thread(served.prompts, body.input, "input")
    data = []
    # One request at a time: texts are written meanwhile.
    async with asyncio.timeout(http.state.server.limits.seconds), http.state.reading:
        for index, ids in enumerate(texts):
            await check_connected(http)
            vector = await asyncio.to_thread(embed, served, ids)
            as_text = body.encoding_format == "base64"
            value: Any = base64.b64encode(vector.tobytes()).decode() if as_text else vector.tolist()
            data.append({"object": "embedding", "index": index, "embedding": value})
    n_tokens = sum(map(len, texts))
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return json_response({"object": "list", "data": data, "model": served.name, "usage": usage})


@torch.inference_mode()
def embed(served: ServedModel, ids: Sequence[int]) -> np.ndarray:
    """A text as a direction, (d_model,) float32."""
    device = next(served.model.parameters()).device
    hidden = served.model(torch.tensor([ids], device=device), head=lambda states, _: states[0].float().mean(dim=0))
    return torch.nn.functional.normalize(hidden, dim=0).cpu().numpy()


async def tokenize(http: Request) -> Response:
    """POST /tokenize. A text that is the name of a control token, and nothing else, is that token."""
    body = TokenizeBody.model_validate(await read_body(http))
    served: ServedModel = http.state.server.find(body.model)
    tokenizer, text = served.tokenizer, body.prompt or ""
    if body.messages is not None:
        turns = [message.model_dump(exclude_none=True) for message in body.messages]
        ids = await asyncio.to_thread(served.template.ids, turns)
    elif text in tokenizer.control_tokens:
        ids = [tokenizer.control_tokens[text]]
    else:
        encode = tokenizer.encode if body.add_special_tokens is False else partial(prompt_ids, tokenizer)
        ids = await asyncio.to_thread(encode, text)
    texts = [served.token_texts[token] for token in ids]
    return json_response({"count": len(ids), "max_model_len": served.engine.length, "tokens": ids, "token_strs": texts})


async def detokenize(http: Request) -> Response:
    """POST /detokenize, with the names of control tokens."""
    body = DetokenizeBody.model_validate(await read_body(http))
    tokenizer = http.state.server.find(body.model).tokenizer
    return json_response({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, False)})


async def tokenizer_info(http: Request) -> Response:
    """GET /tokenizer_info, of the first model: what its files say, so that evaluations begin as they do in process."""
    tokenizer = http.state.server.find(None).tokenizer
    if isinstance(tokenizer, PretrainedTokenizer):
        said: Mapping[str, str] = tokenizer.named_tokens
    else:
        said = {"eos_token": special.END, "pad_token": special.PAD}
    return json_response({name: said.get(name) for name in ("bos_token", "eos_token", "pad_token", "chat_template")})


async def health(http: Request) -> Response:
    """GET /health: the process answers."""
    return json_response({"status": "ok"})


async def ready(http: Request) -> Response:
    """GET /ready: it can write texts."""
    if not http.state.server.is_ready:
        raise APIError(503, "an engine has stopped.", "unavailable", retry_after="10")
    return json_response({"status": "ready"})


async def metrics(http: Request) -> Response:
    """GET /metrics."""
    return Response(http.state.server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(http: Request) -> Response:
    """GET /openapi.json."""
    return json_response(document())
