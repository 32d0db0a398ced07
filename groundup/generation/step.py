"""One step of a model over its cache: new tokens of some slots in, logits out, by whatever is fastest here.

On a CPU a few tokens go through the step in C (`native.py`), which reads each weight once and has no overhead of
Python; many, such as a prompt, through the model's own forward pass, whose matrix products are the library's. Where one
overtakes the other is measured once on each machine and remembered. Without a compiler all go through the forward pass.
On a GPU one token for each slot is a CUDA graph (`graphs.py`), if a trial says that it is faster.
"""

from __future__ import annotations

import copy
from bisect import bisect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor, nn

from groundup.files import value_digest
from groundup.generation.cache import KVCache, Rows
from groundup.generation.graphs import BUCKET, GraphStep
from groundup.generation.native import NativeStep, library, why_not
from groundup.generation.params import SamplingParams
from groundup.measured import fastest, machine, measured_once
from groundup.model import OutputLayer, Transformer

_TRIED = (1, 2, 3, 5, 9, 16, 32, 64, 128)
"""Tokens of a step for which both ways are timed, until the step in C is the slower one."""
_MEASURED: dict[str, dict[str, list[float]]] = {}
"""Timings of this process: rollouts make many engines, and what other programs disturbed is kept in no file."""


class Row(NamedTuple):
    """New tokens of one slot.

    Attributes:
        slot: of the cache.
        ids: the tokens.
        start: position of the first.
        n_logits: of the last so many tokens, logits are wanted.
    """

    slot: int
    ids: Sequence[int]
    start: int
    n_logits: int = 1


class ModelStep:
    """A model, as `inference_copy` gives it, and its cache; `is_native`: the step in C or CUDA graphs may be used.

    Attributes:
        reason: why neither the step in C nor CUDA graphs are used; None: one is.
    """

    def __init__(self, model: Transformer, cache: KVCache, *, is_native: bool = True) -> None:
        self._model, self._cache = model, cache
        self.reason = why_not(model, cache) if is_native else "switched off"
        self._native = NativeStep(model, cache) if self.reason is None else None
        self._graphs = None
        if is_native and cache.device.type == "cuda":
            self._graphs, self.reason = _graphs_if_faster(model, cache)
        if self._native is not None:
            self._timings = _time_steps(model, cache)

    def _estimate(self, way: str, n_tokens: int) -> float:
        """What a step takes in C or by the forward pass; beyond the trial's most tokens each costs as the last ones."""
        times = self._timings[way]
        place = min(bisect(_TRIED, n_tokens), len(times) - 1)
        fewer, more = _TRIED[place - 1], _TRIED[place]
        each = (times[place] - times[place - 1]) / (more - fewer)
        return times[place - 1] + (n_tokens - fewer) * (each if n_tokens <= more else max(0.0, each))

    def __call__(self, rows: Sequence[Row], n_layers: int | None = None) -> Float[Tensor, "wanted vocab"]:
        """Store the rows' tokens; the logits that they ask for, row after row, float32.

        Args:
            rows: of different slots.
            n_layers: run the first so many blocks only, and the output layer on what they give.
        """
        if self._native is not None:
            counts = [len(row.ids) for row in rows]
            padded = len(counts) * max(counts)  # what the forward pass computes
            if self._estimate("native", sum(counts)) < self._estimate("eager", padded):
                return self._native(*_flat(rows), n_layers)
        if self._graphs is not None and n_layers is None and all(len(row.ids) == row.n_logits == 1 for row in rows):
            return self._graphs([row.ids[0] for row in rows], [row.slot for row in rows], [row.start for row in rows])
        model = self._model if n_layers is None else self._model.first_blocks(n_layers)
        return _eager_step(model, self._cache, rows)

    def guess(
        self,
        rows: Sequence[Row],
        most: Sequence[int],
        params: Sequence[SamplingParams],
        uniforms: Float64[Tensor, "rows most"],
        n_layers: int | None = None,
    ) -> tuple[list[list[int]], Float32[Tensor, "rows most vocab"] | None] | None:
        """Draw tokens one after the other behind each row in one call (`NativeStep.guess`); None: not possible here.

        Temperature, top-k, top-p and min-p are those of `params`, the last three nearly.
        """
        if self._native is None:
            return None
        settings = [value for own in params for value in (own.temperature, own.top_k, own.top_p, own.min_p)]
        return self._native.guess(_flat(rows), most, settings, uniforms, n_layers)


def inference_copy(model: Transformer, dtype: torch.dtype | None = None) -> Transformer:
    """The model with its matrices in the dtype of its arithmetic, so that no step has to convert them.

    What needs no conversion is shared with the model, and follows it when it is trained on.

    Args:
        model: put into evaluation mode.
        dtype: of the arithmetic (default: the model's).
    """
    dtype = dtype or model.compute_dtype
    model.eval()
    # Scales of quantized matrices stay float16: the step in C and the files have them so.
    converted = {id(p) for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("scales")}
    if dtype == model.compute_dtype and all(p.dtype == dtype for p in model.parameters() if id(p) in converted):
        return model
    shared: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        data = parameter.detach()
        shared[id(parameter)] = nn.Parameter(
            data.to(dtype) if id(parameter) in converted else data, requires_grad=False
        )
    found = copy.deepcopy(model, shared)
    found.compute_dtype = dtype
    for block in found.blocks:
        block.compute, block.recompute = block.eager, None
    return found


@torch.inference_mode()
def _eager_step(model: Transformer, cache: KVCache, rows: Sequence[Row]) -> Float[Tensor, "wanted vocab"]:
    """By the model's forward pass; shorter rows are padded."""
    counts = [len(row.ids) for row in rows]
    longest = max(counts)
    view = Rows(cache, [row.slot for row in rows], [row.start for row in rows], counts)
    padded = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in rows], device=cache.device)
    wanted = [
        (place, count - row.n_logits + n)
        for place, (row, count) in enumerate(zip(rows, counts, strict=True))
        for n in range(row.n_logits)
    ]
    places = torch.tensor(wanted, dtype=torch.int64, device=cache.device).view(-1, 2)

    def logits_of_wanted(hidden: Float[Tensor, "batch seq d_model"], output: OutputLayer) -> Tensor:
        return output.logits(hidden[places[:, 0], places[:, 1]])

    return model(padded, positions=view.positions, cache=view, head=logits_of_wanted)


def _flat(rows: Sequence[Row]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, slots, positions and what is wanted, token by token."""
    ids: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    for row in rows:
        count = len(row.ids)
        ids += row.ids
        slots += [row.slot] * count
        positions += range(row.start, row.start + count)
        wanted += range(len(ids) - row.n_logits, len(ids))
    return ids, slots, positions, wanted


def _time_steps(model: Transformer, cache: KVCache) -> dict[str, list[float]]:
    """Seconds of steps of `_TRIED` tokens, in C and by the forward pass; measured once."""
    kinds = sorted({f"{type(module).__name__} {getattr(module, 'bits', '')}" for module in model.modules()})
    key = {
        "config": value_digest(model.config.to_dict()), "dtype": str(model.compute_dtype), "modules": kinds,
        "tried": _TRIED, "native": Path(getattr(library()[0], "_name", "")).stem,
    }  # fmt: skip
    known = value_digest([key, machine(cache.device)])

    def measure() -> dict[str, Any]:
        found: dict[str, Any] = {"native": [], "eager": [], "spread": 1.0}
        for n in _TRIED:
            scratch = KVCache(model.config, n, min(64, model.config.context_length), cache.dtype, cache.device)
            rows = [Row(slot, [0], scratch.length // 2) for slot in range(n)]
            ways = {
                "native": partial(NativeStep(model, scratch), *_flat(rows)),
                "eager": partial(_eager_step, model, scratch, rows),
            }
            seconds, spread = fastest(ways)
            for name, best in seconds.items():
                found[name].append(best)
            found["spread"] = max(found["spread"], spread)
            if n >= 64 and seconds["native"] > seconds["eager"]:
                break
        for way in ways:  # more tokens take no less: what is above that was disturbed
            found[way] = list(accumulate(reversed(found[way]), min))[::-1]
        return found

    if known not in _MEASURED:
        found = measured_once("model-step", key, cache.device, measure)
        _MEASURED[known] = {name: found[name] for name in ("native", "eager")}
    return _MEASURED[known]


def _graphs_if_faster(model: Transformer, cache: KVCache) -> tuple[GraphStep | None, str | None]:
    """CUDA graphs, if they can be captured here, give the forward pass's logits and are faster; else why not."""
    scratch = KVCache(model.config, 1, min(BUCKET, model.config.context_length), cache.dtype, cache.device)
    graphs, row = GraphStep(model, scratch), Row(0, [0], 1)

    def whole(run: Callable[[], Tensor]) -> Tensor:
        found = run()
        torch.cuda.synchronize(cache.device)  # a step that is timed must be over
        return found

    run_graph = partial(whole, partial(graphs, [0], [0], [1]))
    run_eager = partial(whole, partial(_eager_step, model, scratch, [row]))
    key = {"config": value_digest(model.config.to_dict()), "dtype": str(model.compute_dtype)}
    try:
        if not torch.allclose(run_graph(), run_eager(), atol=0.1, rtol=0.02):
            return None, "CUDA graphs give other logits here"
        seconds = measured_once(
            "cuda-graphs", key, cache.device, lambda: fastest({"graph": run_graph, "eager": run_eager})[0]
        )
    except RuntimeError as error:
        return None, f"CUDA graphs cannot be captured here ({str(error).splitlines()[0]})"
    if seconds["graph"] >= seconds["eager"]:
        return None, "CUDA graphs are no faster here"
    return GraphStep(model, cache), None
