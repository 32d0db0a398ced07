"""Loss-spike handling: what happens when a loss is not finite or leaps, and where such a number came from.

A step's loss is a spike if it lies more than `spike_z` standard deviations above the mean of the last `WINDOW` good
steps. What then happens is the recipe's choice:

    skip       the update is left out; the batch is gone, the weights are as before
    rollback   the last checkpoint is taken back and training goes on behind the bad batch (as PaLM's authors did by
               hand: arXiv:2204.02311, section 5.1)
    stop       the run ends with the last checkpoint kept
    ignore     a spike is only written down; numbers that are not finite always stop a run that ignores

The window and the counts are part of the checkpoint, so a resumed run decides as an uninterrupted one would.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from groundup.distributed import World
from groundup.errors import ArtifactError
from groundup.model.transformer import Block

OnSpike = Literal["skip", "rollback", "stop", "ignore"]

WINDOW = 128
FEWEST = 32
"""Good steps that must be known before a loss can be called a spike."""
LEAST_SPREAD = 0.01
"""Of the mean: a loss that hardly moves has no spike in a tremor."""
MOST_SKIPPED_IN_A_ROW = 10
MOST_ROLLBACKS = 3


@dataclass(frozen=True)
class Spike:
    """What is wrong with a step."""

    what: str  # in words, with the numbers
    action: OnSpike  # what the recipe wants done; "stop" where that has been tried often enough


class SpikeDetector:
    """Judges every step before its update.

    Args:
        on_spike: what to do.
        spike_z: standard deviations above the mean that make a spike; 0: spikes are not looked for.
    """

    def __init__(self, on_spike: OnSpike, spike_z: float) -> None:
        self._on_spike, self._spike_z = on_spike, spike_z
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped = self.rollbacks = self._in_a_row = 0

    def judge(self, loss: float, grad_norm: float) -> Spike | None:
        """What is wrong with a step, or None; a good step's loss joins the window.

        Args:
            loss: mean over the step's valid tokens, nats.
            grad_norm: of all gradients, before clipping.
        """
        what = self._what_is_wrong(loss, grad_norm)
        if what is None:
            self._losses.append(loss)
            self._in_a_row = 0
            return None
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if self._on_spike == "ignore":
            if is_finite:
                self._losses.append(loss)
            return Spike(what, "ignore" if is_finite else "stop")
        self._in_a_row += 1
        if self._on_spike == "skip" and self._in_a_row > MOST_SKIPPED_IN_A_ROW:
            return Spike(f"{what}; {MOST_SKIPPED_IN_A_ROW} steps before it were skipped", "stop")
        if self._on_spike == "rollback":
            return self._roll_back(what)
        self.skipped += self._on_spike == "skip"
        return Spike(what, self._on_spike)

    def judge_weights(self, what: str) -> Spike:
        """What is to be done about weights that are not finite, in words: to leave out updates does not mend them."""
        if self._on_spike != "rollback":
            return Spike(what, "stop")
        return self._roll_back(what)

    def _roll_back(self, what: str) -> Spike:
        if self.rollbacks >= MOST_ROLLBACKS:
            return Spike(f"{what}; the run was rolled back {self.rollbacks} times", "stop")
        return Spike(what, "rollback")

    def _what_is_wrong(self, loss: float, grad_norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss} and gradient norm {grad_norm} are not finite"
        if not self._spike_z or len(self._losses) < FEWEST:
            return None
        mean = statistics.fmean(self._losses)
        spread = max(statistics.pstdev(self._losses, mean), LEAST_SPREAD * abs(mean))
        z = (loss - mean) / spread
        if z <= self._spike_z:
            return None
        return f"loss {loss:.3f} is {z:.1f} standard deviations above the last {len(self._losses)} steps' {mean:.3f}"

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "losses": list(self._losses),
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ArtifactError: it is something else.
        """
        try:
            losses = [float(loss) for loss in state["losses"]]
            counts = (int(state[name]) for name in ("skipped", "rollbacks", "in_a_row"))
            self.skipped, self.rollbacks, self._in_a_row = counts
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the checkpoint's loss-spike state is damaged ({error!r}).") from error
        self._losses = deque(losses, maxlen=WINDOW)


def likely_causes(what: str) -> str:
    """What to try, for the message that ends a run."""
    if "not finite" in what:
        return (
            "Likely causes: a learning rate too high (lower lr and muon_lr, or lengthen warmup_share), max_grad_norm = "
            "0, or float16 without enough range (precision = 'bfloat16' or 'float32'). on_spike = 'rollback' goes back "
            "and around the batch."
        )
    return (
        "Likely causes: a learning rate too high, or a stretch of unusual text (look at what the step saw: `groundup "
        "shards show`). on_spike = 'rollback' goes back and around it."
    )


def bad_weights(model: nn.Module, world: World) -> str | None:
    """The first parameter, in the order of the forward pass, of which not every weight is finite (all must call it)."""
    found = _first({name: _is_bad(p) for name, p in model.named_parameters()}, world)
    return None if found is None else f"weights of {found} are not finite"


def find_origin(model: nn.Module, passes: Iterable[Callable[[], Tensor]], world: World) -> str:
    """Where the first number that is not finite arose (every process must call it).

    Args:
        model: or all trained modules as one, with the bad step's gradients.
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
def _watched(model: nn.Module, bad: dict[str, bool]) -> Iterator[None]:
    """Within this block `bad` notes for each part, in the order in which they finish, whether its output was bad."""

    def note(name: str) -> Callable[..., None]:
        def look(module: nn.Module, arguments: object, output: object) -> None:
            given = output if isinstance(output, tuple) else (output,)
            bad[name] = bad.get(name, False) or any(_is_bad(one) for one in given if isinstance(one, Tensor))

        return look

    ways = [(block, block.compute, block.recompute) for block in model.modules() if isinstance(block, Block)]
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
