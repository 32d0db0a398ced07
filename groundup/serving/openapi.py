"""The OpenAPI document: made of the models that requests are checked with."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from groundup.serving.protocol import (
    CalculatorBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    FeedbackBody,
    InspectBody,
    TokenizeBody,
)

_TEXT, _NUMBER, _ANY = {"type": "string"}, {"type": "integer"}, {"type": "object"}
_MAYBE = {"type": ["string", "null"]}
_NUMBERS = {"type": "array", "items": _NUMBER}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


_MODEL = _object(id=_TEXT, object={"const": "model"}, created=_NUMBER, owned_by=_TEXT, max_model_len=_NUMBER)
_USAGE = _object(prompt_tokens=_NUMBER, completion_tokens=_NUMBER, total_tokens=_NUMBER)
_REASON = {"enum": ["stop", "length", "tool_calls"]}
_MESSAGE = {"type": "object", "required": ["role", "content"], "properties": {"role": {"const": "assistant"}}}
_CHOICE = _object(index=_NUMBER, message=_MESSAGE, finish_reason=_REASON)
_TEXT_CHOICE = _object(index=_NUMBER, text=_TEXT, finish_reason=_REASON)
_ANSWER = {"id": _TEXT, "object": _TEXT, "created": _NUMBER, "model": _TEXT, "usage": _USAGE}
_VECTOR = {"anyOf": [_TEXT, _list({"type": "number"})]}
_ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param={}, code={}))

_STREAMED = ("/v1/chat/completions", "/v1/completions")
_POSTS: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatBody, _object(choices=_list(_CHOICE), **_ANSWER)),
    "/v1/completions": (CompletionBody, _object(choices=_list(_TEXT_CHOICE), **_ANSWER)),
    "/v1/embeddings": (EmbeddingsBody, _object(data=_list(_object(index=_NUMBER, embedding=_VECTOR)), model=_TEXT)),
    "/tokenize": (TokenizeBody, _object(count=_NUMBER, max_model_len=_NUMBER, tokens=_NUMBERS)),
    "/detokenize": (DetokenizeBody, _object(prompt=_TEXT)),
    "/inspect": (InspectBody, _object(ids=_NUMBERS, tokens=_list(_ANY), layers=_NUMBER, heads=_NUMBER)),
    "/calculator": (CalculatorBody, _object(expression=_MAYBE, result=_MAYBE)),
    "/feedback": (FeedbackBody, _object(folder=_TEXT)),
}
_GETS: dict[str, dict[str, Any]] = {
    "/v1/models": _object(object={"const": "list"}, data=_list(_MODEL)),
    "/v1/models/{name}": _MODEL,
    "/tokenizer_info": _ANY,
    "/training": _object(stages=_list(_ANY)),
    "/health": _object(status=_TEXT),
    "/ready": _object(status=_TEXT),
}


@functools.cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1, as JSON values."""
    bodies = [(model, "validation") for model, _ in _POSTS.values()]
    _, schemas = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, Any] = {path: {"get": _operation(schema)} for path, schema in _GETS.items()}
    paths["/metrics"] = {"get": {"responses": {"200": {"description": "Prometheus's format", "content": {
        "text/plain": {"schema": _TEXT}}}, **_errors()}}}  # fmt: skip
    paths["/v1/models/{name}"]["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _TEXT}]
    for path, (model, schema) in _POSTS.items():
        content = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
        paths[path] = {"post": _operation(schema, streams=path in _STREAMED)}
        paths[path]["post"]["requestBody"] = {"required": True, "content": {"application/json": content}}
    return {
        "openapi": "3.1.0", "info": {"title": "groundup", "version": "1"}, "paths": paths,
        "security": [{}, {"key": []}],
        "components": {"schemas": schemas["$defs"], "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }  # fmt: skip


def _operation(schema: dict[str, Any], *, streams: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if streams:
        content["text/event-stream"] = {"schema": _TEXT}
    return {"responses": {"200": {"description": "The answer.", "content": content}, **_errors()}}


def _errors() -> dict[str, Any]:
    error = {"description": "What is wrong.", "content": {"application/json": {"schema": _ERROR}}}
    return {"4XX": error, "5XX": error}
