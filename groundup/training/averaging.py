"""An exponential moving average of the weights: often a better model than the last step's (arXiv:1806.05594, sec. 3).

average ← decay · average + (1 − decay) · weights, after every step, in float32 beside the weights. The decay warms up
as min(decay, (1 + n) / (10 + n)) over the first n steps, so that the average does not remember the initial weights.
Validation, samples and the finished model use the average; training goes on with the weights themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from groundup.distributed import full_tensor, like_parameter
from groundup.errors import ArtifactError


class WeightAverage:
    """The average of a model's weights, sharded as they are.

    Args:
        model: whose weights.
        decay: share of the average that stays at each step, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._decay, self._n = decay, 0
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Let the weights as they are now enter the average."""
        self._n += 1
        decay = min(self._decay, (1 + self._n) / (10 + self._n))
        averages, weights = list(self._average.values()), [p.detach() for p in self._parameters.values()]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this block the model has the average for its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self._average[name])
            self._average[name].copy_(own)

    @torch.no_grad()
    def make_permanent(self) -> None:
        """Give the model the average for good."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._average[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The average as whole tensors by parameter name, and the count (every process must call it)."""
        state = {name: full_tensor(value).detach().cpu().contiguous() for name, value in self._average.items()}
        return {**state, "n": torch.tensor(self._n)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave, on any number of processes.

        Raises:
            ArtifactError: it is of another model.
        """
        if state.keys() != {*self._average, "n"}:
            odd = sorted(state.keys() ^ {*self._average, "n"})
            raise ArtifactError(f"the checkpoint's average is of another model: {', '.join(odd[:4])}.")
        for name, value in self._average.items():
            value.copy_(like_parameter(state[name], self._parameters[name]))
        self._n = int(state["n"])
