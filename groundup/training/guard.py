"""Watches the loss while a run trains alone: numbers that are not finite, and sudden spikes.

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

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from groundup.errors import ArtifactError

OnTrouble = Literal["skip", "rollback", "stop", "ignore"]

WINDOW = 128
FEWEST = 32
"""Good steps that must be known before a loss can be called a spike."""
LEAST_SPREAD = 0.01
"""Of the mean: a loss that hardly moves has no spike in a tremor."""
MOST_SKIPPED_IN_A_ROW = 10
MOST_ROLLBACKS = 3


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a step.

    Attributes:
        what: in words, with the numbers.
        action: what the recipe wants done; "stop" where that has been tried often enough.
    """

    what: str
    action: OnTrouble


class Guard:
    """Judges every step before its update.

    Args:
        on_trouble: what to do.
        spike_z: standard deviations above the mean that make a spike; 0: spikes are not looked for.
    """

    def __init__(self, on_trouble: OnTrouble, spike_z: float) -> None:
        self._on_trouble, self._spike_z = on_trouble, spike_z
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped = self.rollbacks = self._in_a_row = 0

    def judge(self, loss: float, grad_norm: float) -> Trouble | None:
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
        if self._on_trouble == "ignore":
            if is_finite:
                self._losses.append(loss)
            return Trouble(what, "ignore" if is_finite else "stop")
        self._in_a_row += 1
        if self._on_trouble == "skip" and self._in_a_row > MOST_SKIPPED_IN_A_ROW:
            return Trouble(f"{what}; {MOST_SKIPPED_IN_A_ROW} steps before it were skipped", "stop")
        if self._on_trouble == "rollback":
            return self._roll_back(what)
        self.skipped += self._on_trouble == "skip"
        return Trouble(what, self._on_trouble)

    def judge_weights(self, what: str) -> Trouble:
        """What is to be done about weights that are not finite: to leave out updates does not mend them.

        Args:
            what: in words, which.
        """
        if self._on_trouble != "rollback":
            return Trouble(what, "stop")
        return self._roll_back(what)

    def _roll_back(self, what: str) -> Trouble:
        if self.rollbacks >= MOST_ROLLBACKS:
            return Trouble(f"{what}; the run was rolled back {self.rollbacks} times", "stop")
        return Trouble(what, "rollback")

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
            raise ArtifactError(f"the checkpoint's guard is damaged ({error!r}).") from error
        self._losses = deque(losses, maxlen=WINDOW)


def likely_causes(what: str) -> str:
    """What to try, for the message that ends a run."""
    if "not finite" in what:
        return (
            "Likely causes: a learning rate too high (lower lr and muon_lr, or lengthen warmup_share), clip = 0, or "
            "float16 without enough range (precision = 'bfloat16' or 'float32'). on_trouble = 'rollback' goes back and "
            "around the batch."
        )
    return (
        "Likely causes: a learning rate too high, or a stretch of unusual text (look at what the step saw: `groundup "
        "shards show`). on_trouble = 'rollback' goes back and around it."
    )
