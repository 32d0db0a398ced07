"""A model in a folder, of any family: its configuration, and any parameter of it on request.

`open_stored` finds out what stands in the folder and checks that it is whole (every tensor there, none too many, each
of the right shape) before a weight is read. Loading, importing and exporting are then loops over parameters, and hold
no more in memory than they make.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from groundup.errors import ArtifactError, GroundupError, RecipeError
from groundup.generation.quantize import Quantization
from groundup.generation.rounding import Bits, dequantize
from groundup.interop.digests import check_digests, is_saved_again
from groundup.interop.families import FAMILIES, OURS, Family, computed, huggingface_config, read_config
from groundup.interop.fields import MOST_LAYERS
from groundup.interop.layouts import Layout, make_layout, shapes_in_file, take
from groundup.interop.read_weights import Weights, open_weights
from groundup.model import ModelConfig
from groundup.model.cost import parameter_shapes
from groundup.untrusted import MOST_CONFIG_BYTES, file_inside, read_object, reading

CONFIG_FILE = "config.json"
OURS_KEY = "groundup"
"""Where our configuration stands in a `config.json`."""
QUANTIZATION_KEY, QUANT_FORMAT = "quantization_config", "groundup"
"""Where it says how weights are quantized, and as what `format`. transformers looks there, too: without `quant_method`
it refuses the model; with one that it does not know it would go on, and fill what it misses with random numbers."""

_MOST_EXPERTS = 1 << 18
"""In all layers: far more than any model has."""

_ANOTHER_VERSION = "Read it with the version of groundup that wrote it."
_PREFIXES = ("transformer.", "model.")
_NO_WEIGHTS = re.compile(r"\.attn(\.attention)?\.(masked_)?bias$|\.rotary_emb\.inv_freq$")
"""Tables that old versions of transformers saved with the weights: they follow from the configuration."""


@dataclass(frozen=True)
class StoredModel:
    """A whole model in a folder.

    Attributes:
        folder: where.
        config: its configuration.
        family: the one that its `config.json` names, or None.
        left_out: training noise (dropout) that its `config.json` has and ours has not.
        values: of its `config.json`.
        weights: its tensors.
        layout: where in them each parameter stands.
        shapes: of the parameters with float weights, without filling rows.
        prefix: what the layout's names begin with and the file's do not.
        quantization: how matrices are kept; None: as floats.
        matrices: those that are quantized, with their bits and inputs per scale.
    """

    folder: Path
    config: ModelConfig
    family: Family | None
    left_out: list[str]
    values: dict[str, Any]
    weights: Weights
    layout: Layout
    shapes: dict[str, tuple[int, ...]]
    prefix: str
    quantization: Quantization | None = None
    matrices: dict[str, tuple[Bits, int]] = dataclasses.field(default_factory=dict)

    def huggingface_config(self) -> dict[str, Any]:
        """Its fields in the family's words, the one that it came with where several compute the same; else nothing."""
        return huggingface_config(self.config, self.family.model_type if self.family else None)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a parameter is stored; of several, or quantized, the one that holds them all."""
        if self._is_quantized(name):
            return torch.float32
        found = {self.weights.dtype(tensor.removeprefix(self.prefix)) for tensor in self.layout.sources[name]}
        return found.pop() if len(found) == 1 else torch.float32

    def parameter(self, name: str, expert: int | None = None) -> Tensor:
        """A parameter of ours, or one expert's part of it: in our orientation, in its stored dtype, unpadded.

        The weight of a quantized matrix is dequantized; its `packed` and `scales` are parameters, too.
        """
        if self._is_quantized(name):
            module = name.removesuffix(".weight")
            packed, scales = (self.parameter(f"{module}.{kind}", expert) for kind in ("packed", "scales"))
            return dequantize(packed, scales, self.matrices[module][0])
        place, tensors = self.layout.places[name], self.layout.sources[name]
        if place.is_apart:
            if expert is None:
                return torch.stack([self.parameter(name, index) for index in range(len(tensors))])
            return take(self.weights.read(tensors[expert].removeprefix(self.prefix)), place)
        is_shared = place.slots > 1 or expert is not None
        read = self.weights.read_shared if is_shared else self.weights.read
        whole = take(read(tensors[0].removeprefix(self.prefix)), place)
        return whole if expert is None else whole[expert]

    def _is_quantized(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self.matrices


def open_stored(folder: Path, *, verify: bool = False) -> StoredModel:
    """Find out what model a folder holds, and that it is whole.

    Args:
        folder: of groundup's or of a Hugging Face family.
        verify: compare all files with the digests that were written with them, if there are some.

    Raises:
        ArtifactError: no model, one of a family that is not read, or one whose files are damaged or do not fit.
    """
    path = folder / CONFIG_FILE
    values = read_object(file_inside(folder, CONFIG_FILE), MOST_CONFIG_BYTES)
    if verify:
        check_digests(folder, values)
    with reading(str(path)):
        config, family, left_out = _read_config(values, path)
        quantization = _read_quantization(values, path)
    with reading(str(folder)):
        weights = open_weights(folder)
    names = {name for name in weights.tensors if not _NO_WEIGHTS.search(name)}
    if config.n_layers > min(MOST_LAYERS, len(names)) or config.n_layers * config.n_experts > _MOST_EXPERTS:
        raise ArtifactError(
            f"{weights.source}: not the weights of this configuration ({len(names):,} tensors for "
            f"{config.n_layers:,} layers)."
        )
    shapes = shapes_in_file(parameter_shapes(config), config)
    kept = quantization.tensors(shapes) if quantization else {name: (shape, None) for name, shape in shapes.items()}
    in_file = {name: shape for name, (shape, _) in kept.items()}
    tables = [family.layout, OURS] if family and family.layout else [OURS]
    layouts = [make_layout(table, in_file, config.n_experts) for table in tables]
    # Of the layouts, and what may be missing before their names, the first with the fewest tensors missing.
    _, layout, prefix = min(
        ((sum(name.removeprefix(prefix) not in names for name in layout.tensors), layout, prefix)
         for layout in layouts for prefix in _prefixes(layout, names)), key=lambda found: found[0],
    )  # fmt: skip
    expected = {name.removeprefix(prefix): made for name, made in layout.tensors.items()}
    left_over = _without_tied_copy(names - expected.keys(), config, weights, layout, prefix)
    odd = sorted((expected.keys() - names) | left_over)
    if odd:
        listed = ", ".join(f"{name} {'missing' if name in expected else 'left over'}" for name in odd[:4])
        more = f", and {len(odd) - 4:,} more" if len(odd) > 4 else ""
        raise ArtifactError(f"{weights.source}: not the weights of this configuration ({listed}{more}).")
    for name, made in expected.items():
        stored, dtype = weights.tensors[name], kept[made.pieces[0][0]][1]
        found_dtype = weights.dtype(name, quantized=dtype is not None)
        if stored.shape != made.shape:
            raise ArtifactError(f"{stored.file}: {name} has shape {stored.shape}, not {made.shape}.")
        if dtype not in (None, found_dtype):
            raise ArtifactError(f"{stored.file}: {name} has dtype {found_dtype}, not {dtype}.")
    matrices = {} if quantization is None else quantization.matrices(shapes)
    return StoredModel(
        folder, config, family, left_out, values, weights, layout, shapes, prefix, quantization, matrices
    )


def _read_quantization(values: dict[str, Any], path: Path) -> Quantization | None:
    """How a `config.json` of ours says that matrices are kept; a family's is refused where its fields are read."""
    found = values.get(QUANTIZATION_KEY)
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("format") != QUANT_FORMAT or OURS_KEY not in values:
        raise ArtifactError(
            f"{path}: {QUANTIZATION_KEY} = {found!r:.80}: groundup reads only what it quantized itself.",
            "Look for the model that it was made from.",
        )
    arguments = {name: value for name, value in found.items() if name != "format"}
    known = {field.name for field in dataclasses.fields(Quantization)}
    try:
        if arguments.keys() != known:
            raise GroundupError(f"its fields are {', '.join(sorted(known))}, not {', '.join(sorted(arguments))[:80]}.")
        return Quantization(**arguments)
    except GroundupError as error:
        raise ArtifactError(f"{path}: {QUANTIZATION_KEY}: {error.message}", _ANOTHER_VERSION) from error


def _read_config(values: dict[str, Any], path: Path) -> tuple[ModelConfig, Family | None, list[str]]:
    """Our configuration, the family and what is left out, from a `config.json` of ours or of a family.

    Where transformers has saved a model of ours again, its fields decide (the vocabulary may have grown), and ours say
    what they cannot.
    """
    rest = dict(values)
    own = rest.pop(OURS_KEY, None)
    ours = _own_config(own, path) if isinstance(own, dict) else None
    family = FAMILIES.get(str(values.get("model_type")))
    if ours is not None and not (family and is_saved_again(values)):
        return ours, family, []
    config, family, left_out = read_config(rest, path)
    if ours is not None and ours.n_layers == config.n_layers:
        ours = dataclasses.replace(ours, vocab_size=config.vocab_size)
        config = ours if computed(ours) == computed(config) else config
    return config, family, left_out


def target_layout(config: ModelConfig, shapes: dict[str, tuple[int, ...]], prefer: str | None = None) -> Layout:
    """Where parameters of these shapes stand in the file that we write; of several families, as the preferred one."""
    kind = huggingface_config(config, prefer).get("model_type")
    return make_layout(FAMILIES[kind].layout if kind else OURS, shapes, config.n_experts)


def _prefixes(layout: Layout, names: set[str]) -> list[str]:
    """What may be missing before the names: a model saved without its output layer has no `transformer.`."""
    missing = [
        prefix
        for prefix in _PREFIXES
        if any(name.startswith(prefix) for name in layout.tensors)
        and not any(name.startswith(prefix) for name in names)
    ]
    return ["", *missing]


def _without_tied_copy(
    left_over: set[str], config: ModelConfig, weights: Weights, layout: Layout, prefix: str
) -> set[str]:
    """The tensors left over, but for a copy of the embedding in the place of a tied output layer."""
    name = "lm_head.weight"
    if name not in left_over or not config.tied_embeddings:
        return left_over
    embedding = layout.sources["embed_tokens.weight"][0].removeprefix(prefix)
    if embedding not in weights.tensors or weights.tensors[name].shape != weights.tensors[embedding].shape:
        return left_over
    if not torch.equal(weights.read(name), weights.read(embedding)):
        raise ArtifactError(
            f"{weights.source}: lm_head.weight is not the embedding, though tie_word_embeddings = true.",
            "Set it to false in config.json, if the output layer has weights of its own.",
        )
    return left_over - {name}


def _own_config(values: dict[str, Any], path: Path) -> ModelConfig:
    """Our configuration in a `config.json`, every value of it checked."""
    unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(ModelConfig)})
    if unknown:
        # Left out, it could be a part of the model that is then silently not computed.
        raise ArtifactError(
            f"{path}: describes a model that this version of groundup does not know ({', '.join(unknown)}).",
            _ANOTHER_VERSION,
        )
    try:
        return pydantic.TypeAdapter(ModelConfig).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path}: {place} = {first['input']!r:.60}: {first['msg']}.") from error
    except RecipeError as error:
        raise ArtifactError(f"{path}: {'; '.join(map(str, error.problems))}") from error
