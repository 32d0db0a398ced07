"""Arrays on disk that grow: `.npy` files written piece by piece, and read through memory maps."""

from __future__ import annotations

import types
from pathlib import Path
from typing import IO, Any

import numpy as np


class ArrayWriter:
    """Appends rows to a `.npy` file; the header is put right when it is closed.

    numpy leaves room in every header for a first dimension of 21 digits, so its length never changes.

    Args:
        path: the file, inside a folder that appears whole (`atomic_folder`).
    """

    def __init__(self, path: Path) -> None:
        self._handle: IO[bytes] = path.open("wb")
        self._dtype: np.dtype[Any] | None = None
        self._row: tuple[int, ...] = ()
        self._n_rows = 0

    def append(self, rows: np.ndarray) -> None:
        """Add rows; all calls must agree in dtype and in the shape of a row."""
        rows = np.ascontiguousarray(rows)
        if self._dtype is None:
            self._dtype, self._row = rows.dtype, rows.shape[1:]
            self._write_header()
        assert (rows.dtype, rows.shape[1:]) == (self._dtype, self._row), "rows of another kind"
        self._handle.write(rows.data)
        self._n_rows += len(rows)

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if kind is None and self._dtype is not None:
            self._handle.seek(0)
            self._write_header()
        self._handle.close()

    def _write_header(self) -> None:
        assert self._dtype is not None
        np.lib.format.write_array_header_1_0(
            self._handle,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self._n_rows, *self._row),
            },
        )
