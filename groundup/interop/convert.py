"""From folder to folder, tensor by tensor: `import_folder` takes a model in, `export_folder` gives one out.

Both read one layout and write another, holding a few tensors at a time, never a model. What is imported keeps its dtype
and its tokenizer's files as they are.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.errors import ArtifactError, GroundupError
from groundup.files import MARK, atomic_folder, check_ours, check_signed, write_json
from groundup.integrity import CHECKED
from groundup.interop.digests import DIGESTS_FILE, write_digests
from groundup.interop.families import FAMILIES, differences
from groundup.interop.folder import CONFIG_FILE, find_model
from groundup.interop.layouts import put_together
from groundup.interop.read_weights import DTYPES, INDEX_FILE
from groundup.interop.stored import OURS_KEY, StoredModel, open_stored, target_layout
from groundup.interop.write_weights import TensorSpec, write_weights
from groundup.model import count_parameters
from groundup.stage import CARD_FILE
from groundup.tokenizer.files import GENERATION_FILE, TOKENIZER_FILE, TOKENIZER_FILES, read_files
from groundup.tokenizer.pretrained import SPECIAL_TOKENS, read_tokenizer, token_ids
from groundup.untrusted import parse_object

SHARD_BYTES = 5 * 10**9
"""Bytes of tensors in one file of an export."""

_TOKEN_IDS = tuple(f"{name}_token_id" for name in SPECIAL_TOKENS)
_DTYPES = {name.lower(): dtype for name, dtype in DTYPES.items()}


def import_folder(source: str | Path, out: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Make a folder of groundup's from one of a Hugging Face family.

    Args:
        source: the folder: `config.json`, safetensors (one file or several with an index), perhaps a tokenizer.
        out: the new folder.
        force: replace a model that is there.

    Returns:
        What was written: `folder`, `family`, `parameters`, `bytes`, `dtype`, `tokenizer` (whether there is one) and
        `left_out` (settings of training that the source has and groundup's recipes decide).

    Raises:
        ArtifactError: the source is damaged or not to be trusted, of a family that is not read, or has parts that
            groundup does not compute, each named.
        GroundupError: `out` is there already, or cannot be written.
    """
    stored = open_stored(Path(source), verify=True)
    config = {**stored.huggingface_config(), OURS_KEY: stored.config.to_dict()}
    return _convert(stored, Path(out), config, dtype=None, most_bytes=None, force=force)


def export_folder(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    stage: str | None = None,
    most_bytes: int = SHARD_BYTES,
    force: bool = False,
) -> dict[str, Any]:
    """Make a folder that `AutoModelForCausalLM` and `AutoTokenizer` of transformers load as it stands.

    Args:
        source: a run, a stage or a model's folder.
        out, force: as for `import_folder`, and so is what is returned.
        dtype: "f32", "f16" or "bf16"; None: as the source has it.
        stage: of a run: see `load`.
        most_bytes: of tensors in one file; more go to several, with an index.

    Raises:
        ArtifactError: the source is damaged; or transformers has no such architecture, and what it lacks is named.
        GroundupError: an unknown dtype, or `out` is there already or cannot be written.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise GroundupError(f"dtype = {dtype!r}: is not one of {', '.join(_DTYPES)}.")
    stored = open_stored(find_model(source, stage=stage), verify=True)
    config = stored.huggingface_config()
    if not config:
        lacking = min((differences(stored.config, name) for name in FAMILIES), key=len)
        raise ArtifactError(
            f"{stored.folder}: transformers has no architecture that computes this model: {'; '.join(lacking)[:400]}.",
            "groundup loads the folder as it is; choose parts that transformers has before training.",
        )
    return _convert(
        stored, Path(out), config, dtype=None if dtype is None else _DTYPES[dtype], most_bytes=most_bytes, force=force
    )


def _convert(
    stored: StoredModel,
    out: Path,
    config: dict[str, Any],
    *,
    dtype: torch.dtype | None,
    most_bytes: int | None,
    force: bool,
) -> dict[str, Any]:
    layout = target_layout(stored.config, stored.shapes, config.get("model_type"))
    dtypes = {
        name: dtype or functools.reduce(torch.promote_types, {stored.dtype(part) for part, _ in made.pieces})
        for name, made in layout.tensors.items()
    }
    specs = [TensorSpec(name, dtypes[name], made.shape) for name, made in layout.tensors.items()]

    def tensor(name: str) -> Tensor:
        whole = put_together(layout.tensors[name], stored.parameter)
        return _cast(whole, dtypes[name], f"{stored.weights.source}: {name}")

    files = read_files(stored.folder, TOKENIZER_FILES)
    main = next(dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if dtype in dtypes.values())
    config["dtype"] = str(main).removeprefix("torch.")
    ids, generation = _token_ids(stored, files)
    check_new_folder(out, stored.folder, force=force)
    with atomic_folder(out) as partial:
        n_bytes = write_weights(partial, specs, tensor, most_bytes=most_bytes)
        for name, contents in files.items():
            (partial / name).write_bytes(contents)
        if generation:
            write_json(partial / GENERATION_FILE, generation)
        ours = config.pop(OURS_KEY, None)
        write_json(partial / CONFIG_FILE, {**config, **ids, **({} if ours is None else {OURS_KEY: ours})})
        write_digests(partial)
    return {
        "folder": str(out),
        "family": config.get("model_type"),
        "parameters": count_parameters(stored.config),
        "bytes": n_bytes,
        "dtype": config["dtype"],
        "tokenizer": TOKENIZER_FILE in files,
        "left_out": stored.left_out,
    }


def _token_ids(stored: StoredModel, files: dict[str, bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What begins and ends a text and fills up a batch, and the generation file if it is to be written anew.

    As the source has it, else as the tokenizer says; of the tokens that end a text all that any file names.
    """
    theirs = parse_object(files.get(GENERATION_FILE, b"{}"), str(stored.folder / GENERATION_FILE))
    ids = {name: value for name, value in stored.values.items() if name in _TOKEN_IDS}
    if TOKENIZER_FILE in files:
        found = token_ids(read_tokenizer(files, str(stored.folder / TOKENIZER_FILE), stored.values))
        several = {"eos_token_id": found["eos_token_id"]} if isinstance(found["eos_token_id"], list) else {}
        ids = found | ids | several
        if GENERATION_FILE in files and theirs != theirs | several:
            return ids, theirs | several
    return ids, {} if GENERATION_FILE in files else ids


def _cast(tensor: Tensor, dtype: torch.dtype, source: str) -> Tensor:
    cast = tensor.to(dtype)
    if dtype == torch.float16 and not torch.equal(cast.isinf(), tensor.isinf()):
        raise ArtifactError(
            f"{source} has a value of {float(tensor.abs().max()):.3g}, which float16 cannot hold.", "Export it as bf16."
        )
    return cast


def check_new_folder(out: Path, source: Path, *, force: bool) -> None:
    """Hold that a model may be written: it replaces only an empty folder or, if forced, a model."""
    here, there = (Path(os.path.realpath(path)) for path in (out, source))
    if here == there or here in there.parents or there in here.parents:
        raise GroundupError(f"{out}: is the folder that is read, or one inside or around it.", "Name another folder.")
    if (out / CONFIG_FILE).is_file():
        if not force:
            raise GroundupError(f"{out}: holds a model already.", "Name another folder, or replace it with --force.")
        known = {CARD_FILE, CHECKED, CONFIG_FILE, DIGESTS_FILE, GENERATION_FILE, INDEX_FILE, MARK, *TOKENIZER_FILES}
        more = [path.name for path in out.iterdir() if path.name not in known and path.suffix != ".safetensors"]
        if more:
            raise GroundupError(f"{out}: also holds {', '.join(sorted(more)[:4])}.", "Move that away first.")
        check_signed(out / CARD_FILE)
    check_ours(out)
