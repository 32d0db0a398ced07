"""The page that a browser opens, and what only it asks for: looking inside, votes, a training that goes on.

The files in `page/` are served as they are: no build step, no address elsewhere. It talks to the same endpoints as
every other client, and to these three:

    POST /inspect     {"model", "prompt" | "messages" | "tokens", "top", "position", "attention"} → `Inspection.to_json`
    POST /feedback    {"model", "messages", "vote" + "answer" | "ranking" | "answer" + "correction"} → what was written
    GET  /training    the run's stages, their curves and newest samples, read from its folder
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from groundup.report.record import Curve, read_record
from groundup.run import Run
from groundup.serving.feedback import Feedback
from groundup.serving.inspect import inspect
from groundup.serving.protocol import APIError, Body, MessageBody, Tokens, json_response, read_body
from groundup.serving.state import State

FILES = Path(__file__).with_name("page")
MOST_POINTS = 400  # of a curve; of a longer one every so manieth is given
Answer = Annotated[str, Field(max_length=200_000)]
Messages = Annotated[list[MessageBody], Field(min_length=1, max_length=4096)]


class InspectBody(Body):
    """/inspect: a plain text, a conversation up to the assistant's turn, or token ids."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tokens: Tokens | None = None
    top: int | None = Field(None, ge=1, le=50, description="Alternatives of each token (default: 10).")
    position: int | None = Field(None, ge=0, description="Whose next token's logits are given whole (default: last).")
    attention: bool | None = Field(None, description="With the attention of every layer and head (default: true).")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(one is not None for one in (self.prompt, self.messages, self.tokens)) != 1:
            raise ValueError("give prompt, messages or tokens")
        return self


class FeedbackBody(Body):
    """/feedback: what somebody thinks of the answers to a conversation."""

    model: str | None = None
    messages: Messages
    answer: Answer | None = None
    vote: Literal["up", "down"] | None = None
    correction: Answer | None = None
    ranking: Annotated[list[Answer], Field(min_length=2, max_length=16)] | None = Field(None, description="Best first.")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(one is not None for one in (self.vote, self.correction, self.ranking)) != 1:
            raise ValueError("give vote, correction or ranking")
        if (self.answer is None) != (self.ranking is not None):
            raise ValueError("vote and correction need answer, and ranking has none")
        return self


def routes(state: State) -> list[BaseRoute]:
    """The page's routes."""

    def route(path: str, method: str, work: Callable[[State, Request], Coroutine[Any, Any, Response]]) -> Route:
        async def endpoint(request: Request) -> Response:
            return await work(state, request)

        return Route(path, endpoint, methods=[method], name=path.strip("/"))

    return [
        Route("/", lambda _: FileResponse(FILES / "index.html", headers={"cache-control": "no-cache"}), name="page"),
        Mount("/page", StaticFiles(directory=FILES)),
        route("/inspect", "POST", _inspect),
        route("/feedback", "POST", _feedback),
        route("/training", "GET", _training),
    ]


async def _inspect(state: State, request: Request) -> Response:
    body = InspectBody.model_validate(await read_body(request))
    served = state.find(body.model)
    text: str | list[int]
    if body.messages is not None:
        text = served.template.ids([one.model_dump(exclude_none=True) for one in body.messages])
    else:
        text = body.tokens if body.tokens is not None else body.prompt or ""
    seen = await run_in_threadpool(functools.partial(inspect, served.model, served.tokenizer, text, top=body.top or 10))
    position = len(seen.ids) - 1 if body.position is None else body.position
    if position >= len(seen.ids):
        raise APIError(400, f"position: the text has {len(seen.ids)} tokens.", "invalid_value", "position")
    value = seen.to_json(position=position, with_attention=body.attention is not False)
    return json_response({"model": served.name, **value})


async def _feedback(state: State, request: Request) -> Response:
    body = FeedbackBody.model_validate(await read_body(request))
    served = state.find(body.model)
    folder = state.run or served.folder
    if folder is None:
        raise APIError(409, "this model was not read from a folder: there is no place for votes.", "no_folder")
    feedback, name = Feedback(folder), served.name
    messages = [{"role": one.role, "content": one.content} for one in body.messages]
    if body.ranking is not None:
        await run_in_threadpool(feedback.rank, name, messages, body.ranking)
    elif body.correction is not None:
        await run_in_threadpool(feedback.correct, name, messages, body.answer or "", body.correction)
    else:
        await run_in_threadpool(feedback.vote, name, messages, body.answer or "", is_good=body.vote == "up")
    return json_response({"folder": str(folder)})


async def _training(state: State, _: Request) -> Response:
    if state.run is None:
        return json_response({"run": None, "stages": []})
    record = await run_in_threadpool(read_record, Run(state.run))
    stages = [
        {"name": name, "state": stage.state, "title": stage.title, **_curve(record.curves.get(name))}
        for name, stage in record.stages.items()
    ]
    return json_response({"run": record.name, "about": record.about, "stages": stages, "warnings": record.warnings})


def _curve(curve: Curve | None) -> dict[str, Any]:
    """A stage's curves, thinned, and what it wrote last."""
    if curve is None:
        return {}
    newest = curve.samples[-1]["step"] if curve.samples else None
    latest = curve.timings[-1] if curve.timings else {}
    return {
        "loss": _thinned([(line["step"], line["loss"]) for line in curve.train]),
        "val_loss": _thinned([(line["step"], line["val_loss"]) for line in curve.validation]),
        "tokens_per_second": latest.get("tokens_per_second"),
        "samples": [line for line in curve.samples if line["step"] == newest],
    }


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """With the last point, whatever is left out."""
    every = -(-len(points) // MOST_POINTS) or 1
    return points[::-1][::every][::-1]
