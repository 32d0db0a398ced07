"""A model as one GGUF file, for llama.cpp and all that is built on it (Ollama, LM Studio, …).

In: a model and its tokenizer. Out: a file with everything in it. The head is written by the `gguf` package, from
llama.cpp's own repository; the weights follow tensor by tensor and slice by slice, so that memory stays at the model's
and one tensor more. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from groundup.errors import ArtifactError, GroundupError
from groundup.files import atomic_writer
from groundup.generation.quantize import quantization_of
from groundup.interop.gguf_architecture import architecture_of, describe_architecture
from groundup.interop.gguf_tensors import GGUFTensor, tensors_of
from groundup.interop.gguf_vocabulary import vocabulary_of
from groundup.model import Transformer
from groundup.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
"""How matrices are kept: 32, 16, 16, 8.5 and 4.5 bits a weight."""

_BLOCK = 32
"""Weights of a row that share a scale, in q8_0 and q4_0."""

_SLICE_VALUES = 1 << 22
"""Weights converted at a time."""

_LARGEST = {"F16": 65504.0, "Q8_0": 65504.0 * 127, "Q4_0": 65504.0 * 8}
"""What a type can hold: float16's largest value, or that as the scale of a block."""


def export_gguf(
    model: Transformer, tokenizer: Tokenizer | None, out: str | Path, *, dtype: GgufType | None = None
) -> dict[str, Any]:
    """Write a model as a GGUF file, which appears whole or not at all.

    In q4_0 the output layer (and an embedding that is tied to it) has 8.5 bits: there an error hurts most. Rows that
    are no multiple of 32 long stay in f16 with both q8_0 and q4_0; norms, biases, learned positions and routers are
    f32 in every file. A quantized model's matrices leave with the same numbers that it computes with.

    Args:
        model: on one device. tokenizer: byte-level BPE, groundup's or a pretrained one; None: the file has none, and
        llama.cpp takes ids only. out: the file. dtype: how matrices are kept (default: f16; of a quantized model, q8_0
        or q4_0 as it has 8 or 4 bits).

    Returns:
        What was written: `dtype`, `architecture`, `context_length`, `n_tensors`, `n_parameters`, `bytes`, `types`
        (tensors by their type) and `notes` (sentences on what differs from the model, if anything).

    Raises:
        ArtifactError: llama.cpp cannot compute this model or tokenize like this tokenizer; each reason is named. Or a
            weight is too large for the type.
        GroundupError: the `gguf` package is not installed, or the file cannot be written.
    """
    out = Path(out)
    quantization = quantization_of(model)
    own: GgufType = "f16" if quantization is None else "q8_0" if quantization.bits == 8 else "q4_0"
    dtype = dtype or own
    if dtype not in get_args(GgufType):
        raise GroundupError(f"dtype = {dtype!r}: is not one of {', '.join(get_args(GgufType))}.")
    gguf = _package()
    config = model.config
    architecture = architecture_of(config, out)
    vocabulary = vocabulary_of(tokenizer, config.vocab_size, out)
    keeps = quantization is not None and dtype == own
    plan = [
        (piece, _type_of(piece, dtype, config.tied_embeddings, keeps and piece.bits))
        for piece in tensors_of(model, architecture)
    ]
    with atomic_writer(out, binary=True) as handle:
        writer = gguf.GGUFWriter(handle.name, architecture.name)
        writer.add_type("model")
        writer.add_name(out.stem)
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == 'f32' else 'MOSTLY'}_{dtype.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        describe_architecture(writer, config, architecture)
        for name, value in vocabulary.items():
            getattr(writer, f"add_{name}")(value)
        for piece, kind in plan:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            n_bytes = piece.n_values // block * size
            # Of the four-byte type numpy knows, whatever the type in the file: the shape is in values.
            writer.add_tensor_info(piece.name, piece.shape, np.dtype(np.float32), n_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        handle.seek(0, os.SEEK_END)
        for piece, kind in plan:
            handle.write(bytes(-handle.tell() % writer.data_alignment))
            is_kept = keeps and piece.bits and kind.name in ("Q8_0", "Q4_0")
            for values in [_blocks(piece)] if is_kept else _slices(piece, kind, out):
                handle.write(values)
        handle.write(bytes(-handle.tell() % writer.data_alignment))
    return {
        "dtype": dtype,
        "architecture": architecture.name,
        "context_length": architecture.context_length,
        "n_tensors": len(plan),
        "n_parameters": sum(piece.n_values for piece, _ in plan),
        "bytes": out.stat().st_size,
        "types": dict(Counter(kind.name for _, kind in plan)),
        "notes": _notes(model, architecture.context_length, plan, dtype),
    }


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise GroundupError("gguf is not installed.", "Install it: pip install 'groundup[gguf]'.") from error
    return gguf


def _type_of(piece: GGUFTensor, dtype: GgufType, is_tied: bool, own_bits: int) -> GGMLQuantizationType:
    """How a tensor is kept; of a quantized matrix that stays as it is (`own_bits`), its own type."""
    from gguf import GGMLQuantizationType as Kind

    if own_bits:
        return Kind.F32 if piece.shape[-1] % _BLOCK else Kind.Q8_0 if own_bits == 8 else Kind.Q4_0
    if not piece.is_matrix or dtype == "f32":
        return Kind.F32
    if dtype in ("q8_0", "q4_0") and piece.shape[-1] % _BLOCK:
        return Kind.F16
    is_output = piece.name == "output.weight" or (is_tied and piece.name == "token_embd.weight")
    return Kind.Q8_0 if dtype == "q4_0" and is_output else Kind[dtype.upper()]


def _blocks(piece: GGUFTensor) -> bytes:
    """A quantized matrix as blocks of 32: a scale, then their values; a longer group's scale is repeated."""
    assert piece.make_packed is not None
    packed, scales = (part.detach().cpu().contiguous() for part in piece.make_packed())
    n_blocks = piece.n_values // _BLOCK
    each = scales.reshape(-1).repeat_interleave(n_blocks // scales.numel())
    parts = (each.half().view(torch.uint8).view(n_blocks, 2), packed.view(torch.uint8).view(n_blocks, -1))
    return torch.cat(parts, dim=1).numpy().tobytes()


def _slices(piece: GGUFTensor, kind: GGMLQuantizationType, out: Path) -> Iterator[bytes]:
    """The tensor's bytes, some rows at a time."""
    from gguf import quantize

    with torch.no_grad():
        rows = piece.make().detach().cpu().float().reshape(-1, piece.shape[-1])
        for part in torch.split(rows, max(1, _SLICE_VALUES // rows.shape[-1])):
            largest = float(part.abs().max())
            if not largest <= _LARGEST.get(kind.name, torch.finfo(torch.float32).max):  # and NaN
                raise ArtifactError(
                    f"{out}: {piece.name} has the value {largest:g}, which {kind.name.lower()} cannot hold.",
                    "Choose bf16 or f32." if np.isfinite(largest) else "The model is damaged: take an earlier one.",
                )
            yield quantize(part.contiguous().numpy(), kind).tobytes()


def _notes(
    model: Transformer, context_length: int, plan: list[tuple[GGUFTensor, GGMLQuantizationType]], dtype: GgufType
) -> list[str]:
    notes = []
    if context_length < model.config.context_length:
        notes.append(
            f"context_length is {context_length} instead of {model.config.context_length}: this architecture has no "
            "window, and up to this length llama.cpp computes the same."
        )
    whole = [piece.name for piece, kind in plan if dtype in ("q8_0", "q4_0") and kind.name == "F16"]
    if whole:
        notes.append(
            f"{len(whole)} matrices stay in f16: their rows are no multiple of {_BLOCK} long ({whole[0]}"
            + (", …)." if len(whole) > 1 else ").")
        )
    return notes
