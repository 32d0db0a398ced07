"""Other programs' files of token ids, read and written.

- nanoGPT: `train.bin`, `val.bin`; uint16 ids, no header, documents end with end-of-text. Nothing in such a file says
  what its ids are: what looks like wider ones is refused until `uint16`, `uint32` or `int64` is named.
- numpy.save: `.npy`; its header says all. Of two dimensions, each row is a document.
- llm.c and modded-nanogpt: 256 int32 (magic, version, number of ids, zeros), then ids: magic 20240520 version 1 has
  uint16, magic 20240801 version 7 has uint32 (llm.c, dev/data/data_common.py). Documents begin with end-of-text.
- Megatron-LM's IndexedDataset (megatron/core/datasets/indexed_dataset.py): `.bin` has the ids; `.idx` has
  "MMIDIDX", two zeros, a version (u64, 1), a code of the ids' type (u8), numbers of sequences and of document borders
  (u64), the sequences' lengths (int32), their bytes' offsets (int64), the borders (int64, counted in sequences, 0
  first). Documents end with end-of-text if they were made with --append-eod.
- Parquet, and Arrow files as Hugging Face's `datasets` saves them: a column of lists of integers. What an
  `attention_mask` beside it masks is padding, and left out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groundup.errors import ArtifactError, GroundupError
from groundup.files import atomic_writer
from groundup.untrusted import ordinary_file, reading

if TYPE_CHECKING:
    import pyarrow

RAW_DTYPES = {"nanogpt": "<u2", "uint16": "<u2", "uint32": "<u4", "int64": "<i8"}
SUFFIXES = {
    **dict.fromkeys(RAW_DTYPES, ".bin"), "npy": ".npy", "llmc": ".bin", "megatron": ".idx", "parquet": ".parquet",
    "arrow": ".arrow",
}  # fmt: skip
LLMC_KINDS: dict[tuple[int, int], np.dtype[Any]] = {
    (20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")
}  # fmt: skip
LLMC_HEADER = 256 * 4
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""The codes of integers; 6 and 7 are floats."""
MEGATRON_HEADER = struct.Struct("<9sQBQQ")
MOST_INT32 = (1 << 31) - 1
NUMPY_MAGIC = b"\x93NUMPY"
ID_COLUMNS = ("input_ids", "tokens", "token_ids", "ids")
MASK_COLUMN = "attention_mask"
BLOCK_TOKENS = 1 << 22
COMPLETE = "Get the file again, whole, or leave it out."


@dataclass(frozen=True)
class IdBlock:
    """Some of a file's ids.

    Attributes:
        tokens: (n,) integers of any type.
        ends: where documents end in them, (n_documents,) int64; None if the format does not say.
        is_last: whether the file ends here, where the format does not say where documents end.
        padding: ids that were left out.
    """

    tokens: np.ndarray
    ends: np.ndarray | None
    is_last: bool = False
    padding: int = 0


def read_ids(path: Path, format: str, column: str | None = None) -> Iterator[IdBlock]:
    """A file's ids, in blocks.

    Args:
        path: the file (megatron: its `.idx`).
        format: a key of `SUFFIXES`.
        column: of a table, with the ids (default: one of `ID_COLUMNS`, or the only one with lists of integers).

    Raises:
        ArtifactError: missing, cut off, damaged, or not ids in this format.
    """
    with reading(str(path), fix=COMPLETE):
        size = ordinary_file(path).stat().st_size
        if format in ("parquet", "arrow"):
            yield from _read_table(path, column)
        elif format == "megatron":
            yield from _read_megatron(path)
        else:
            with path.open("rb") as handle:
                header = handle.read(LLMC_HEADER)
            if format == "llmc":
                tokens = _llmc_ids(path, header, size)
            elif format == "npy" or header.startswith(NUMPY_MAGIC):
                tokens = _numpy_ids(path)
            else:
                tokens = _raw_ids(path, format, size)
            yield from _blocks(tokens)


def _raw_ids(path: Path, format: str, size: int) -> np.ndarray:
    dtype = np.dtype(RAW_DTYPES[format])
    if size % dtype.itemsize:
        name = dtype.name
        raise ArtifactError(f"{path}: {size:,} bytes, which is not a number of {name} ids: cut off.", COMPLETE)
    tokens = _mapped(path, dtype, size // dtype.itemsize)
    # Wider ids cut in pieces: every second one is zero in most pairs, or small beside one that is not.
    halves = (tokens[: 1 << 20 : 2], tokens[1 : 1 << 20 : 2]) if len(tokens) > 1 else ()
    zero, small = ([(half < limit).mean() for half in halves] or [0] for limit in (1, 16))
    is_small = len(tokens) >= 64 and max(small) >= 0.99 and min(small) < 0.5
    if format == "nanogpt" and (max(zero) >= 0.5 or is_small):
        raise ArtifactError(
            f"{path}: as uint16, every second id is small, as if wider ids were cut in pieces; the file does not say "
            "what they are.",
            "Say --format uint32 or int64, or --format uint16 if they are uint16.",
        )
    return tokens


def _numpy_ids(path: Path) -> np.ndarray:
    array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        shape = "×".join(map(str, array.shape))
        raise ArtifactError(f"{path}: {shape} values of {array.dtype}, not ids in one or two dimensions.")
    return array.view(np.ndarray)


def _llmc_ids(path: Path, header: bytes, size: int) -> np.ndarray:
    magic, version, n_tokens = struct.unpack_from("<3i", header.ljust(12, b"\0"))
    dtype = LLMC_KINDS.get((magic, version))
    if dtype is None:
        raise ArtifactError(
            f"{path}: begins with magic {magic}, version {version}; llm.c's token files have 20240520, 1 (uint16) or "
            "20240801, 7 (uint32).",
            "Say another --format.",
        )
    expected = LLMC_HEADER + n_tokens * dtype.itemsize
    if size != expected or n_tokens < 0:
        raise ArtifactError(
            f"{path}: {size:,} bytes instead of {expected:,} for its {n_tokens:,} ids; cut off or damaged.", COMPLETE
        )
    return _mapped(path, dtype, n_tokens, LLMC_HEADER)


def _mapped(path: Path, dtype: np.dtype[Any], n_tokens: int, header: int = 0) -> np.ndarray:
    if not n_tokens:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=header, shape=(n_tokens,)).view(np.ndarray)


def _blocks(array: np.ndarray) -> Iterator[IdBlock]:
    """A stream, or rows that are documents, in blocks."""
    length = array.shape[1] if array.ndim == 2 else 1
    at_once = max(1, BLOCK_TOKENS // max(1, length))
    for begin in range(0, len(array), at_once):
        part = array[begin : begin + at_once]
        ends = np.arange(1, len(part) + 1, dtype=np.int64) * length if array.ndim == 2 else None
        yield IdBlock(part.ravel(), ends, begin + at_once >= len(array))


def _read_megatron(index_path: Path) -> Iterator[IdBlock]:
    _, path = megatron_paths(index_path)
    dtype, lengths, borders = _read_megatron_index(index_path)
    size, n_tokens = ordinary_file(path).stat().st_size, int(lengths.sum(dtype=np.int64))
    if size != n_tokens * dtype.itemsize:
        raise ArtifactError(
            f"{path}: {size:,} bytes instead of {n_tokens * dtype.itemsize:,}, which {index_path.name} asks for; cut "
            "off or damaged.",
            COMPLETE,
        )
    sequence_ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    ends = sequence_ends[borders[1:]]
    tokens = _mapped(path, dtype, n_tokens)
    begin = place = 0
    while place < len(ends):
        # Whole documents, as many as fit in a block, at least one.
        until = max(place + 1, int(np.searchsorted(ends, begin + BLOCK_TOKENS, side="right")))
        end = int(ends[until - 1])
        yield IdBlock(tokens[begin:end], ends[place:until] - begin)
        begin, place = end, until


def megatron_paths(path: Path) -> tuple[Path, Path]:
    """The `.idx` and the `.bin` of a data set, named by one of them or by what they have in common."""
    stem = path.with_suffix("") if path.suffix in (".idx", ".bin") else path
    return stem.with_name(f"{stem.name}.idx"), stem.with_name(f"{stem.name}.bin")


def _read_megatron_index(path: Path) -> tuple[np.dtype[Any], np.ndarray, np.ndarray]:
    """Type of ids, lengths of sequences, and the sequences at which documents end (0 first)."""
    data = path.read_bytes()
    magic, version, code, n_sequences, n_borders = MEGATRON_HEADER.unpack_from(data.ljust(MEGATRON_HEADER.size, b"\0"))
    if magic != MEGATRON_MAGIC or version != 1:
        raise ArtifactError(f"{path}: not an index of Megatron-LM's (MMIDIDX, version 1).", "Say another --format.")
    if code not in MEGATRON_DTYPES:
        raise ArtifactError(f"{path}: its ids are of type {code}, which is not an integer type.")
    size, expected = len(data), MEGATRON_HEADER.size + 12 * n_sequences + 8 * n_borders
    if size != expected:
        modes = " (it has sequence modes: data for several kinds of input)" if size == expected + n_sequences else ""
        raise ArtifactError(f"{path}: {size:,} bytes instead of {expected:,}{modes}; cannot be used.", COMPLETE)
    dtype = np.dtype(MEGATRON_DTYPES[code])
    lengths = np.frombuffer(data, "<i4", n_sequences, MEGATRON_HEADER.size)
    pointers = np.frombuffer(data, "<i8", n_sequences, MEGATRON_HEADER.size + 4 * n_sequences)
    borders = np.frombuffer(data, "<i8", n_borders, MEGATRON_HEADER.size + 12 * n_sequences)
    ends = np.cumsum(lengths, dtype=np.int64)
    if (lengths < 0).any() or (pointers != (ends - lengths) * dtype.itemsize).any():
        raise ArtifactError(f"{path}: its sequences do not lie one after the other; damaged, or cut by hand.")
    rises = n_borders > 0 and borders[0] == 0 and borders[-1] == n_sequences and (np.diff(borders) >= 0).all()
    if not rises:
        raise ArtifactError(f"{path}: its document borders do not go from 0 to its {n_sequences:,} sequences; damaged.")
    return dtype, lengths, borders


def _read_table(path: Path, column: str | None) -> Iterator[IdBlock]:
    import pyarrow.compute as pc

    def lengths_of(lists: pyarrow.Array) -> np.ndarray:
        lists.validate(full=True)  # damaged offsets would end the process
        return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)

    schema, batches = _open_parquet(path) if path.suffix == ".parquet" else _open_arrow(path)
    chosen = _id_column(path, schema, column)
    masks = MASK_COLUMN if MASK_COLUMN in schema.names else None
    for batch in batches([chosen, masks] if masks else [chosen]):
        rows = batch.column(chosen)
        lengths, values = lengths_of(rows), rows.flatten()
        if values.null_count:
            raise ArtifactError(f"{path}: column {chosen!r} has lists with nulls in them.", "Fill or remove them.")
        tokens, n_stored = values.to_numpy(zero_copy_only=False), len(values)
        if masks:
            mask = batch.column(masks)
            if not np.array_equal(lengths_of(mask), lengths):
                what = f"{path}: the rows of column {masks!r} are not as long as those of {chosen!r}."
                raise ArtifactError(what, f"Take {masks!r} out, or name another --column.")
            kept = mask.flatten().to_numpy(zero_copy_only=False).astype(bool)
            before = np.concatenate([[0], np.cumsum(kept)])
            tokens, lengths = tokens[kept], np.diff(before[np.cumsum(lengths)], prepend=0)
        yield IdBlock(tokens, np.cumsum(lengths), padding=n_stored - len(tokens))


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    # A page of a few bytes can stand for a billion ids; their number is written beside it.
    most = max(
        (group.column(place).num_values // max(1, group.num_rows) for group in groups
         for place in range(group.num_columns)), default=0,
    )  # fmt: skip
    at_once = max(1, min(4096, BLOCK_TOKENS // max(1, most)))
    return file.schema_arrow, lambda columns: file.iter_batches(batch_size=at_once, columns=columns)


def _open_arrow(path: Path) -> Any:
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        stream = pa.ipc.open_stream(source)
        return stream.schema, lambda columns: stream
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(source)
        return file.schema, lambda columns: (file.get_batch(number) for number in range(file.num_record_batches))


def _id_column(path: Path, schema: pyarrow.Schema, column: str | None) -> str:
    import pyarrow as pa

    def has_ids(kind: pyarrow.DataType) -> bool:
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return is_list and pa.types.is_integer(kind.value_type)

    candidates = [field.name for field in schema if has_ids(field.type) and field.name != MASK_COLUMN]
    if column is not None:
        chosen = [column] if column in candidates else []
    else:
        chosen = [name for name in ID_COLUMNS if name in candidates][:1] or candidates
    if len(chosen) != 1:
        raise ArtifactError(
            f"{path}: {'more than one' if len(chosen) > 1 else 'no'} column of lists of integers"
            f"{f' named {column!r}' if column else ''}; its columns are "
            f"{', '.join(f'{field.name} ({field.type})' for field in schema)}.",
            "Name the one with the ids: --column.",
        )
    return chosen[0]


def write_ids(path: Path, blocks: Iterable[np.ndarray], header: bytes = b"") -> None:
    """Write ids one after the other, as they are."""
    with atomic_writer(path, binary=True) as handle:
        handle.write(header)
        for block in blocks:
            handle.write(np.ascontiguousarray(block).data)


def write_megatron_index(path: Path, lengths: np.ndarray, dtype: np.dtype[Any]) -> None:
    """Write the `.idx` of a data set whose documents have these lengths (n_documents,), each one sequence.

    Raises:
        GroundupError: a document is longer than the format can say.
    """
    if int(lengths.max(initial=0)) > MOST_INT32:
        raise GroundupError(f"{path}: a document of {int(lengths.max()):,} ids; the format's lengths are int32.")
    code = next(code for code, name in MEGATRON_DTYPES.items() if np.dtype(name) == dtype)
    offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    borders = np.arange(len(lengths) + 1, dtype="<i8")
    header = MEGATRON_HEADER.pack(MEGATRON_MAGIC, 1, code, len(lengths), len(borders))
    write_ids(path, (lengths.astype("<i4"), offsets.astype("<i8"), borders), header)
