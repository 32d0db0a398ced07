"""The page that a browser opens, and what only it asks for: looking inside, votes, a training that goes on.

The files in `page/` are served as they are: no build step, no address elsewhere. It talks to the same endpoints as
every other client, and to these:

    POST /inspect     {"model", "prompt" | "messages" | "tokens", "top", "position", "attention"} → `Inspection.to_json`
    POST /feedback    {"model", "messages", "vote" + "answer" | "ranking" | "answer" + "correction"} → what was written
    POST /calculator  {"answer"} → {"expression", "result"} of an answer that is a call of the calculator, else nulls
    GET  /training    the run's stages, their curves and newest samples, read from its folder
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from groundup.generation.calculator import calculate, read_call
from groundup.report.record import Curve, read_record
from groundup.run import Run
from groundup.serving.feedback import keep
from groundup.serving.inspect import inspect
from groundup.serving.protocol import (
    APIError,
    CalculatorBody,
    FeedbackBody,
    InspectBody,
    check_connected,
    json_response,
    read_body,
)
from groundup.serving.state import ServedModel, State

FILES = Path(__file__).with_name("page")
MOST_POINTS = 400  # of a curve; longer ones are thinned


def routes() -> list[BaseRoute]:
    """For `make_app`."""
    return [
        Route("/", page),
        Mount("/page", StaticFiles(directory=FILES)),
        Route("/inspect", look_inside, methods=["POST"]),
        Route("/feedback", feedback, methods=["POST"]),
        Route("/calculator", calculator, methods=["POST"]),
        Route("/training", training),
    ]


async def page(http: Request) -> Response:
    """GET /."""
    return FileResponse(FILES / "index.html")


async def look_inside(http: Request) -> Response:
    """POST /inspect."""
    body = InspectBody.model_validate(await read_body(http))
    served: ServedModel = http.state.server.find(body.model)
    text: str | list[int]
    if body.messages is not None:
        text = served.template.ids([one.model_dump(exclude_none=True) for one in body.messages])
    else:
        text = body.tokens if body.tokens is not None else body.prompt or ""
    work = functools.partial(inspect, served.model, served.tokenizer, text, top=body.top or 10)
    # One request at a time: texts are written meanwhile.
    async with asyncio.timeout(http.state.server.limits.seconds), http.state.reading:
        await check_connected(http)
        seen = await asyncio.to_thread(work)
    position = len(seen.ids) - 1 if body.position is None else body.position
    if position >= len(seen.ids):
        raise APIError(400, f"position: the text has {len(seen.ids)} tokens.", "invalid_value", "position")
    value = seen.to_json(position=position, with_attention=body.attention is not False)
    return json_response({"model": served.name, **value})


async def feedback(http: Request) -> Response:
    """POST /feedback."""
    body = FeedbackBody.model_validate(await read_body(http))
    state: State = http.state.server
    served = state.find(body.model)
    folder = state.run or served.folder
    if folder is None:
        raise APIError(409, "this model was not read from a folder: there is no place for votes.", "no_folder")
    opinion = body.model_dump(exclude_none=True, include={"answer", "vote", "correction", "ranking"})
    messages = [one.model_dump() for one in body.messages]
    await asyncio.to_thread(keep, folder, served.name, messages, opinion)
    return json_response({"folder": str(folder)})


async def calculator(http: Request) -> Response:
    """POST /calculator."""
    body = CalculatorBody.model_validate(await read_body(http))
    expression = read_call(body.answer)
    return json_response({"expression": expression, "result": None if expression is None else calculate(expression)})


async def training(http: Request) -> Response:
    """GET /training."""
    state: State = http.state.server
    if state.run is None:
        return json_response({"run": None, "stages": []})
    record = await asyncio.to_thread(read_record, Run(state.run))
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
