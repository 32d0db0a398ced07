"""A head on a model: a few numbers from the last hidden state of a text, for reward models, classifiers and values.

    scores = W h + b      h: of the text's last real token; W ~ N(0, 1 / (d + 1)), b = 0 (arXiv:2009.01325, appendix)

What stands behind that token, padding, changes nothing: attention is causal. `head/` is a folder of two files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import xxhash
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from groundup.alignment.lora import freeze
from groundup.alignment.method import AlignmentMethod, Inputs
from groundup.alignment.packing import by_length
from groundup.distributed import full_tensor
from groundup.errors import ArtifactError
from groundup.files import atomic_folder, write_json, write_tensors
from groundup.interop import load_model
from groundup.model import ModelConfig, OutputLayer, Transformer
from groundup.stage import Stage
from groundup.tokenizer import Tokenizer
from groundup.training import Objective, Source, TrainingJob
from groundup.training.optimizers import Shapes
from groundup.untrusted import file_inside, read_object, reading

HEAD_FOLDER = "head"
_WEIGHTS, _CONFIG = "head.safetensors", "head.json"


class Head(nn.Module):
    """A linear layer on hidden states, in float32."""

    def __init__(self, d_model: int, n_outputs: int = 1, seed: int = 1) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/head.weight".encode()) >> 1)
        self.weight = nn.Parameter(torch.randn(n_outputs, d_model, generator=draw) / math.sqrt(d_model + 1))
        self.bias = nn.Parameter(torch.zeros(n_outputs))

    def forward(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_outputs"]:
        """The outputs."""
        return F.linear(hidden.float(), self.weight, self.bias)


def at_ends(ends: Int[Tensor, " batch"]) -> Callable[[Tensor, OutputLayer], Float[Tensor, "batch d_model"]]:
    """The hidden states at these places, in the form that `Transformer.forward(head=…)` takes."""

    def pick(hidden: Float[Tensor, "batch seq d_model"], output: OutputLayer) -> Float[Tensor, "batch d_model"]:
        return hidden[torch.arange(len(hidden), device=hidden.device), ends]

    return pick


class HeadMethod(AlignmentMethod):
    """A method that trains a model, or adapters beside it, and a fresh head."""

    is_default = False
    outputs = ("model/[!.]*", f"{HEAD_FOLDER}/[!.]*")
    saved: ClassVar[tuple[tuple[str, str], ...]]  # what `head/` keeps of the summary: its name there, and the figure's

    def beside(self, stage: Stage, config: ModelConfig) -> dict[str, Shapes]:
        """The head; how many outputs it has, the data say."""
        return {"head": {"weight": (1, config.d_model)}}

    def head_job(
        self, inputs: Inputs, n_outputs: int, objective: Objective, source: Source, n_rows: float, **more: Any
    ) -> TrainingJob:
        """A job with a head of so many outputs."""
        model = inputs.model
        if model.lm_head is not None:
            freeze(model.lm_head)  # it has no gradient
        head = Head(model.config.d_model, n_outputs, inputs.seed)
        return inputs.job(objective, source, n_rows, beside={"head": head}, **more)

    def save(self, inputs: Inputs, job: TrainingJob, summary: dict[str, Any]) -> None:
        """Write `model/`, and `head/` with what else there is to know of it."""
        super().save(inputs, job, summary)
        tensors = {name: full_tensor(part).detach().cpu() for name, part in job.modules["head"].named_parameters()}
        values = {name: summary[figure] for name, figure in self.saved}
        if inputs.world.is_first:
            with atomic_folder(job.folder / HEAD_FOLDER) as partial:
                write_tensors(partial / _WEIGHTS, tensors)
                write_json(partial / _CONFIG, {"kind": self.makes, **values})
        inputs.world.wait()


def load_with_head(folder: str | Path, kind: str) -> tuple[Transformer, Tokenizer, Head, dict[str, Any]]:
    """What a stage with a head has left in its folder: model, tokenizer, head, and what else there is to know of it.

    Args:
        folder: `runs/demo/reward`.
        kind: what it must be: "scorer" or "classifier".

    Raises:
        ArtifactError: missing, damaged, or of another kind.
    """
    place = Path(folder) / HEAD_FOLDER
    fix = f"Name the folder of a stage that makes a {kind}."
    if not (place / _CONFIG).is_file():
        raise ArtifactError(f"{folder}: holds no {kind}.", fix)
    values = read_object(file_inside(place, _CONFIG))
    if values.get("kind") != kind:
        raise ArtifactError(f"{folder}: is a {values.get('kind')}, not a {kind}.", fix)
    model, tokenizer = load_model(Path(folder) / "model")
    with reading(str(place / _WEIGHTS)):
        tensors = load_file(file_inside(place, _WEIGHTS))
        head = Head(tensors["weight"].shape[1], tensors["weight"].shape[0])
        head.load_state_dict(tensors)
    if tokenizer is None or head.weight.shape[1] != model.config.d_model:
        raise ArtifactError(f"{folder}: the head does not fit the model.")
    return model, tokenizer, head.eval(), values


@torch.no_grad()
def outputs_of(model: Transformer, head: nn.Module, texts: Sequence[Sequence[int]]) -> Float[Tensor, "texts n_outputs"]:
    """The outputs of whole texts in tokens, in evaluation mode."""
    model.eval()
    device = next(head.parameters()).device
    found: dict[int, Tensor] = {}
    for places in by_length([len(text) for text in texts]):
        rows = [torch.tensor(texts[place]) for place in places]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        ends = torch.tensor([len(row) - 1 for row in rows], device=device)
        found |= zip(places.tolist(), head(model(ids, head=at_ends(ends))).cpu(), strict=True)
    return torch.stack([found[place] for place in range(len(texts))])
