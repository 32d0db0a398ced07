"""Seeded damage to folders of files, and child processes in which readers meet it.

A case is a reader's name and a number: the same two give the same bytes on every machine. Each runs in a forked child
under a limit of memory and of time, so that what ends the process, or never ends, is named like any other fault.
"""

from __future__ import annotations

import bz2
import collections
import faulthandler
import gzip
import json
import lzma
import math
import multiprocessing as mp
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from groundup.errors import GroundupError

Files = dict[str, bytes]
"""A folder: contents by name."""

CPU_SECONDS, SECONDS, MEMORY, MOST_ENDS = 10, 60.0, 1 << 30, 3
"""What a case may take: seconds of computing and in all, bytes beyond the process's own; how often a child may end
before the rest of its cases is left out."""
SECRET = "nobody-may-read-this"
PACKING: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    ".gz": (lambda data: gzip.compress(data, mtime=0), gzip.decompress),
    ".zst": (zstandard.ZstdCompressor().compress, lambda data: zstandard.ZstdDecompressor().decompress(data, 1 << 26)),
    ".bz2": (bz2.compress, bz2.decompress),
    ".xz": (lzma.compress, lzma.decompress),
}
_DEEP = 3_000
_STRANGE: list[Any] = [
    None, True, -1, 0, 7, 2**31, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf,
    "", "../secret", "/dev/zero", ".", "a/b", "\0", "\ud800", "x" * 5_000, "́" * 300, "9" * 5_000, [], {}, [[]],
    [0] * 3_000, {"": {}}, {"__class__": 1},
]  # fmt: skip


def damage(files: Files, folder: Path, draw: random.Random) -> str:
    """Write the files into a folder, one of them damaged or replaced by something that is no file; says how."""
    name = draw.choice(sorted(files))
    said = []
    if draw.random() < 0.12:
        kind = draw.choice(sorted(_PLACES))
        said.append(f"{name}: {kind}")
        changed = {other: data for other, data in files.items() if other != name}
        _write(changed, folder)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _PLACES[kind](folder / name, folder.parent, files[name])
        return said[0]
    data, suffix = files[name], Path(name).suffix
    is_packed = suffix in PACKING and draw.random() < 0.6
    if is_packed:
        data = PACKING[suffix][1](data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        how, data = _damaged(name.removesuffix(suffix) if is_packed else name, data, files, draw)
        said.append(how)
    if is_packed:
        data = PACKING[suffix][0](data)
    elif suffix in PACKING and draw.random() < 0.03:
        said.append("bomb")
        data = PACKING[suffix][0](b"a" * (1 << 24)) * 8
    _write({**files, name: data}, folder)
    return f"{name}: {', '.join(said)}"


def _write(files: Files, folder: Path) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _link_out(path: Path, outside: Path, data: bytes) -> None:
    target = outside / f"outside{path.suffix}"
    line = json.dumps({"text": SECRET}).encode() + b"\n"
    target.write_bytes({".jsonl": line, ".txt": SECRET.encode(), ".md": SECRET.encode()}.get(path.suffix, data))
    path.symlink_to(target)


_PLACES: dict[str, Callable[[Path, Path, bytes], object]] = {
    "missing": lambda path, outside, data: None,
    "pipe": lambda path, outside, data: os.mkfifo(path),
    "link to a device": lambda path, outside, data: path.symlink_to("/dev/zero"),
    "link to itself": lambda path, outside, data: path.symlink_to(path.name),
    "link to the folder": lambda path, outside, data: path.symlink_to("."),
    "link to nothing": lambda path, outside, data: path.symlink_to("nothing"),
    "link out": _link_out,
    "folder": lambda path, outside, data: path.mkdir(),
}


def _damaged(name: str, data: bytes, files: Files, draw: random.Random) -> tuple[str, bytes]:
    """One kind of damage: of the value where the file is JSON or TOML, else of the bytes."""
    suffix = Path(name).suffix
    if draw.random() < 0.6:
        try:
            if suffix == ".json":
                return "value", _json(_with_strange_value(json.loads(data), draw), draw)
            if suffix in (".jsonl", ".journal"):
                lines = data.splitlines()
                at = draw.randrange(len(lines))
                lines[at] = _json(_with_strange_value(json.loads(lines[at]), draw), draw)
                return f"value in line {at + 1}", b"\n".join(lines) + b"\n"
            if suffix == ".toml":
                return "value", _toml(data.decode(), draw)
        except (ValueError, RecursionError, IndexError):
            pass  # damaged already
    how = draw.choice(sorted(_BYTES))
    return how, _BYTES[how](data, draw, files)


def _with_strange_value(value: Any, draw: random.Random) -> Any:
    """A copy in which one value, at a random place, is another, gone, or nested deeply."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        place = draw.choice(sorted(value)) if isinstance(value, dict) else draw.randrange(len(value))
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        what = draw.random()
        if what < 0.08:
            del copy[place]
        elif what < 0.12 and isinstance(copy, dict):
            copy[str(draw.choice(("", "x" * 3_000, "../x", "\ud800")))] = copy.pop(place)
        else:
            copy[place] = _with_strange_value(value[place], draw)
        return copy
    if draw.random() < 0.06:
        return _Deep()
    return draw.choice(_STRANGE)


class _Deep:
    """Stands for a value that is nested deeper than a program's stack."""


def _json(value: Any, draw: random.Random) -> bytes:
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5, default=lambda _: "DEEP")
    brackets = draw.choice((("[", "]"), ('{"a":', "}")))
    deep = brackets[0] * 30 * _DEEP + ("" if draw.random() < 0.5 else "1" + brackets[1] * 30 * _DEEP)
    return text.replace('"DEEP"', deep, 1).encode(errors="surrogatepass")


def _toml(text: str, draw: random.Random) -> bytes:
    lines = text.splitlines()
    settings = [at for at, line in enumerate(lines) if "=" in line]
    at = draw.choice(settings)
    strange = [
        "true", "-1", "0", "1e400", "nan", "-inf", "1" + "0" * 400, "9223372036854775808", "1_000_000_000_000", '""',
        '"../secret"', '"\\u0000"', "[]", "{}", "[[]]", "1979-05-27T07:32:00Z", "[" * _DEEP + "]" * _DEEP,
        "{a=" * _DEEP, '"' + "x" * 3_000 + '"', '["/dev/zero"]', "1e-320", '"0b"', '"999999b"', "[1, 2, 3]",
    ]  # fmt: skip
    value = draw.choice(strange)
    key = lines[at].split("=")[0].strip()
    lines[at] = f"{'.'.join([key] * _DEEP) if draw.random() < 0.03 else key} = {value}"
    return "\n".join(lines).encode()


def _between(data: bytes, draw: random.Random, most: int = 1 << 12) -> tuple[int, int]:
    begin = draw.randrange(len(data) + 1)
    return begin, min(len(data), begin + draw.randrange(1, most))


def _flip(data: bytes, draw: random.Random, _: Files) -> bytes:
    changed = bytearray(data)
    for _ in range(min(len(changed), draw.choice((1, 1, 3, 20)))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(data: bytes, draw: random.Random, _: Files) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _without(data: bytes, draw: random.Random, _: Files) -> bytes:
    begin, end = _between(data, draw)
    return data[:begin] + data[end:]


def _twice(data: bytes, draw: random.Random, _: Files) -> bytes:
    begin, end = _between(data, draw)
    return data[:end] + data[begin:end] * draw.choice((1, 2, 50)) + data[end:]


def _noise(data: bytes, draw: random.Random, _: Files) -> bytes:
    begin, end = _between(data, draw, 64)
    return data[:begin] + draw.randbytes(end - begin) + data[end:]


def _huge(data: bytes, draw: random.Random, _: Files) -> bytes:
    """A number in binary, or in digits, is enormous, negative or zero."""
    digits = [at for at, byte in enumerate(data[:100_000]) if 48 <= byte <= 57]
    if digits and draw.random() < 0.5:
        at = draw.choice(digits)
        number = draw.choice((b"99999999999", b"-1", b"9" * 400, b"1e999", b"18446744073709551615"))
        return data[:at] + number + data[at + 1 :]
    at = draw.randrange(len(data) + 1) & ~3
    number = draw.choice((b"\xff" * 4, b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\xff" * 7 + b"\x7f"))
    return data[:at] + number + data[at + len(number) :]


def _deep(data: bytes, draw: random.Random, _: Files) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.choice((b"[", b'{"a":', b"<div>", b"(", b"WARC/1.0\r\n")) * 10 * _DEEP + data[at:]


_BYTES: dict[str, Callable[[bytes, random.Random, Files], bytes]] = {
    "bits": _flip,
    "cut": _cut,
    "block gone": _without,
    "block again": _twice,
    "noise": _noise,
    "huge number": _huge,
    "nested": _deep,
    "empty": lambda data, draw, files: b"",
    "zeros": lambda data, draw, files: data[: len(data) // 2] + b"\0" * draw.choice((1, 64, 70_000)),
    "another file": lambda data, draw, files: files[draw.choice(sorted(files))],
    "junk behind": lambda data, draw, files: data + draw.choice((b"\0" * 512, b"junk", data[: len(data) // 2])),
    "mark before": lambda data, draw, files: draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"\x28")) + data,
    "marks without order": lambda data, draw, files: data + "ạ̈̂".encode() * 40_000,
    "line without end": lambda data, draw, files: data.replace(b"\n", b" ") + b"x" * 200_000,
}


# --- Running


Reader = tuple[Callable[[], list[Files]], Callable[[Path], object]]
"""Folders that are well, and what reads one: it raises only errors of ours, AssertionError where something is lost."""


def faults(name: str, reader: Reader, numbers: range) -> Iterator[tuple[int, str]]:
    """The cases that went wrong, each with its number, what was done and what came out."""
    context, seeds = mp.get_context("fork"), reader[0]()
    first = numbers.start
    for _ in range(MOST_ENDS):
        ours, theirs = context.Pipe(duplex=False)
        with tempfile.TemporaryFile("w+") as log:
            child = context.Process(
                target=_child, args=(name, seeds, reader[1], range(first, numbers.stop), theirs, log)
            )
            child.start()
            theirs.close()
            at, done = first, False
            try:
                while True:
                    kind, at, text = ours.recv()
                    if kind == "fault":
                        yield at, text
                    done = kind == "end"
            except EOFError:
                child.join()
            if done:
                break
            log.seek(0)
            lines = log.read().splitlines()
            stack = [line.strip() for line in lines if "/groundup/" in line]
            said = next((line for line in lines if line.startswith(("Timeout", "Fatal"))), " ".join(lines[-1:]))
            yield at, f"ended with {child.exitcode} ({said[:200]}) {stack[0] if stack else ''}"
            first = at + 1
            if first == numbers.stop:
                break


def _child(
    name: str, seeds: list[Files], read: Callable[[Path], object], numbers: range, results: Any, log: Any
) -> None:
    os.dup2(log.fileno(), 2)
    os.dup2(log.fileno(), 1)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.register(signal.SIGXCPU, file=log, chain=True)
    with tempfile.TemporaryDirectory() as place:
        for number in numbers:
            draw = random.Random(f"{name}:{number}")
            folder = Path(place) / "in"
            folder.mkdir()
            how = damage(draw.choice(seeds), folder, draw)
            results.send(("at", number, how))
            resource.setrlimit(
                resource.RLIMIT_CPU, (int(time.process_time()) + 1 + CPU_SECONDS, resource.RLIM_INFINITY)
            )
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=log)
            try:
                shown = read(folder)
                if SECRET in str(shown):
                    results.send(("fault", number, f"{how}: read a file that is not in the folder"))
            except GroundupError:
                pass
            except BaseException as error:
                results.send(("fault", number, f"{how}: {_in_words(error)}"))
            faulthandler.cancel_dump_traceback_later()
            shutil.rmtree(place, ignore_errors=True)
            Path(place).mkdir()
        results.send(("end", numbers.stop, ""))
    sys.stdout.flush()
    os._exit(0)


def _in_words(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/groundup/" in frame.filename] or frames
    place = f"{ours[-1].filename.rpartition('/groundup/')[2]}:{ours[-1].lineno}"
    return f"{type(error).__name__} at {place}: {str(error)[:160]!r}"


def grouped(found: list[tuple[int, str]], name: str) -> str:
    """Faults by kind, each with the cases that show it."""
    kinds = collections.defaultdict(list)
    for number, text in found:
        kinds[text.split(": ", 2)[-1] if " at " in text else text].append((number, text))
    return "\n".join(
        f"{len(cases)} × {kind}  [{name}:{cases[0][0]} {cases[0][1][:80]}]" for kind, cases in kinds.items()
    )
