"""Files on the net (s3://, gs://, https:// and whatever else fsspec knows): found, and read as if they were local.

In: an address. Out: `RemoteFile`s, with size and version as the server states them, so that a large store is asked
once and not once a worker. Whatever goes wrong while reading, in whichever library, is an OSError here.
"""

from __future__ import annotations

import contextlib
import glob
import io
import posixpath
import re
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import unquote, urlsplit, urlunsplit

import xxhash

from groundup.errors import DataError

BUFFER_BYTES = 1 << 20
_VERSION_KEYS = (
    "ETag", "etag", "Content-MD5", "md5Hash", "md5", "crc32c", "generation", "checksum", "VersionId", "LastModified",
    "Last-Modified", "last_modified", "updated", "mtime", "created",
)  # fmt: skip
_WEB = ("http", "https")


@dataclass(frozen=True)
class RemoteFile:
    """One file on the net.

    Attributes:
        url: its address.
        size: in bytes, or None where the server does not say.
        version: what the server says of its version (a checksum, a time of change), or "".
        can_seek: whether it can be read from the middle.
        below: its path below the folder that was asked for.
    """

    url: str
    size: int | None = None
    version: str = ""
    can_seek: bool = False
    below: str = ""

    @property
    def name(self) -> str:
        """The last part of its path."""
        path = urlsplit(self.url).path if _protocol(self.url) in _WEB else self.url
        return unquote(posixpath.basename(path.rstrip("/")))

    @property
    def label(self) -> str:
        """The address as it may be shown: without passwords and signatures, which stand in front and behind."""
        if _protocol(self.url) not in _WEB:
            return self.url
        parts = urlsplit(self.url)
        label = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        return f"{label}?{xxhash.xxh3_64_hexdigest(parts.query.encode())[:8]}" if parts.query else label

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The bytes as they are stored; `mode` is "rb".

        Raises:
            OSError: it cannot be opened, or (while reading) read to its end.
            DataError: the protocol's library is not installed on this machine.
        """
        filesystem, path = _filesystem(self.url)
        # A web server that sends no ranges is read in one go; asked for a second block it would send the first.
        streamed = {"block_size": 0} if _protocol(self.url) in _WEB and not self.can_seek else {}
        try:
            handle = filesystem.open(path, "rb", **streamed)
        except Exception as error:
            raise RemoteReadError(error) from error
        return io.BufferedReader(_RemoteStream(handle, self.size), BUFFER_BYTES)


def find_remote(url: str) -> tuple[list[RemoteFile], bool]:
    """The files that an address means (a file, a folder with all below it, a glob), and whether they were listed.

    Raises:
        DataError: the protocol is unknown, its library is missing, nothing is there, or the server says no.
    """
    filesystem, path = _filesystem(url)
    is_web = _protocol(url) in _WEB
    try:
        if not is_web and glob.has_magic(url) and not filesystem.exists(path):
            found = filesystem.glob(path, detail=True)
            if not found:
                raise DataError(f"{url}: nothing matches this pattern.", "Check [corpus] inputs.")
            for name, info in list(found.items()):
                if info["type"] == "directory":
                    found.pop(name)
                    found |= filesystem.find(name, detail=True)
            base = posixpath.dirname(re.split(r"[*?\[]", path)[0])
        else:
            info = filesystem.info(path)
            if info["type"] != "directory":
                return [_remote_file(filesystem, url if is_web else filesystem.unstrip_protocol(path), info)], False
            found, base = filesystem.find(path, detail=True), path
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file or folder.", "Check [corpus] inputs.") from error
    except Exception as error:  # every store's library has errors of its own
        detail = str(error) or type(error).__name__
        raise DataError(f"{url}: cannot be reached ({detail}).", "Check the address, the net and your keys.") from error
    files = [
        _remote_file(filesystem, filesystem.unstrip_protocol(name), info, name.removeprefix(base).lstrip("/"))
        for name, info in found.items()
        if info["type"] == "file"
    ]
    return files, True


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it."""
    kind = f"{url}: {_protocol(url)}://"
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DataError(f"{kind} needs what is not installed ({error}).", "pip install 'groundup[cloud]'") from error
    except ValueError as error:
        raise DataError(f"{kind} is no kind of address known here.", "These are: s3://, gs://, https://.") from error


def _remote_file(filesystem: Any, url: str, info: dict[str, Any], below: str = "") -> RemoteFile:
    version = "; ".join(f"{key}={info[key]}" for key in _VERSION_KEYS if info.get(key) is not None)
    size, can_seek = info.get("size"), bool(info.get("size")) and info.get("partial", True)
    if can_seek and _protocol(url) in _WEB:  # few web servers say whether they send parts: one byte is asked for
        can_seek = False
        # Where that fails it is read from front to back, and that says what is wrong.
        with contextlib.suppress(Exception), filesystem.open(url, "rb", block_size=1, cache_type="none") as handle:
            handle.seek(1)
            can_seek = len(handle.read(1)) == 1
    return RemoteFile(url, size, version, can_seek, below)


def _protocol(url: str) -> str:
    return url.partition("://")[0].rpartition("::")[2]


class RemoteReadError(OSError):
    """A file on the net could not be read to its end, whatever its library calls that."""

    def __init__(self, error: Exception | str) -> None:
        named = f"{type(error).__name__}: {error}".rstrip(": ")
        super().__init__(error if isinstance(error, str) else named)


class _RemoteStream(io.RawIOBase):
    """fsspec's file with one kind of error, which is also raised where the bytes end before the file does."""

    def __init__(self, handle: Any, size: int | None) -> None:
        self._handle, self._size, self._position = handle, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._handle.seekable())

    def readinto(self, buffer: Any, /) -> int:
        target = memoryview(buffer).cast("B")
        try:
            data = self._handle.read(len(target))
        except Exception as error:
            raise RemoteReadError(error) from error
        if not data and len(target) and self._size is not None and self._position < self._size:
            raise RemoteReadError(f"the server sent {self._position:,} of {self._size:,} bytes")
        target[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._position = self._handle.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if not self.closed:
            self._handle.close()
        super().close()
