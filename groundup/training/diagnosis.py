"""Where a number that is not finite comes from; looked for only when there is one.

In: the model as it stood in the bad step, its gradients, and the step's forward passes to do again. Out: one clause for
the guard's message. What is not finite spreads: forward to all that follows, and from the loss back to every gradient.
So the order of looking is: weights; then the forward pass, whose first part with a bad output is the origin; then
gradients, where the origin is the part nearest to the loss, since the backward pass comes there first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from groundup.distributed import World
from groundup.model import Transformer


def bad_weights(model: nn.Module, world: World) -> str | None:
    """The first parameter, in the order of the forward pass, of which not every weight is finite (all must call it)."""
    found = _first({name: _is_bad(p) for name, p in model.named_parameters()}, world)
    return None if found is None else f"weights of {found} are not finite"


def origin(model: Transformer, passes: Iterable[Callable[[], Tensor]], world: World) -> str:
    """Where the first number that is not finite arose (every process must call it).

    Args:
        model: with the bad step's gradients.
        passes: the step's forward passes on this process, each to its loss; they are done again, without a gradient.
        world: the processes; what any of them sees counts.
    """
    weights = bad_weights(model, world)
    if weights is not None:
        return weights
    bad: dict[str, bool] = {}
    with torch.no_grad(), _watched(model, bad):
        losses = [_is_bad(forward()) for forward in passes]
    bad["the loss"] = any(losses)
    found = _first(bad, world)
    if found == "the loss":
        return "the last hidden states are finite, but not the loss that is made of them"
    if found is not None:
        return f"the output of {found} is the first that is not finite, though all weights are"
    # The backward pass makes gradients in the reversed order of the forward pass, which `bad` has seen.
    places = {name: place for place, name in enumerate(bad)}
    backward = sorted(
        model.named_parameters(), key=lambda named: places.get(named[0].rpartition(".")[0], len(bad)), reverse=True
    )
    found = _first({name: p.grad is not None and _is_bad(p.grad) for name, p in backward}, world)
    if found is not None:
        return f"the gradient of {found} is the first that is not finite on the way back from a finite loss"
    return "the same step done again is finite, so look at the machine (memory, driver) too"


@contextlib.contextmanager
def _watched(model: Transformer, bad: dict[str, bool]) -> Iterator[None]:
    """Within this block `bad` notes for each part, in the order in which they finish, whether its output was bad."""

    def note(name: str) -> Callable[..., None]:
        def look(module: nn.Module, arguments: object, output: object) -> None:
            given = output if isinstance(output, tuple) else (output,)
            bad[name] = bad.get(name, False) or any(_is_bad(one) for one in given if isinstance(one, Tensor))

        return look

    ways = [(block, block.compute, block.recompute) for block in model.blocks]
    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        for block, _, _ in ways:  # what is compiled cannot be looked into
            block.compute, block.recompute = block.eager, None
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for block, compute, recompute in ways:
            block.compute, block.recompute = compute, recompute


def _is_bad(tensor: Tensor) -> bool:
    local: Tensor = getattr(tensor, "_local_tensor", tensor).detach()
    return local.is_floating_point() and not bool(local.isfinite().all())


def _first(bad: dict[str, bool], world: World) -> str | None:
    """The first name whose flag is set on any process; all have the same names in the same order."""
    flags = world.sum(torch.tensor([float(flag) for flag in bad.values()])).tolist()
    return next((name for name, flag in zip(bad, flags, strict=True) if flag), None)
