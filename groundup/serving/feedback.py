"""What people think of answers, kept as data to learn from.

In: votes, rankings and corrections, from the page and from the terminal. Out, in a run's folder:

    preferences.jsonl     {"prompt": [messages], "chosen": "…", "rejected": "…"}     of two ranked answers, a correction
                          {"prompt": [messages], "ranking": ["best", …, "worst"]}    of more than two
                          {"prompt": [messages], "completion": "…", "label": true}   of one vote, up or down
    conversations.jsonl   {"messages": [messages, the answer]}                       of an up-vote, a correction

Every line also has "model" and "time". Fine-tuning reads conversations; the reward model and DPO read preferences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock

from groundup.errors import DataError
from groundup.files import append_line, write_error
from groundup.run import OWN_FOLDER

PREFERENCES, CONVERSATIONS = "preferences.jsonl", "conversations.jsonl"


def keep(folder: Path, model: str, messages: Sequence[Mapping[str, Any]], opinion: Mapping[str, Any]) -> None:
    """Add an opinion to the files of a run or a model; any number of programs may do so at the same time.

    Args:
        folder: of the run or the model.
        model: that answered.
        messages: what it answered to.
        opinion: as in `/feedback`: "vote" or "correction" with "answer", or "ranking", best first.

    Raises:
        DataError: a ranking of fewer than two different answers, or a correction that says nothing else.
    """
    preference: dict[str, Any] = {"prompt": messages}
    good = None
    if "ranking" in opinion:
        answers = list(dict.fromkeys(opinion["ranking"]))
        if len(answers) < 2:
            raise DataError("a ranking needs two different answers.")
        pair = {"chosen": answers[0], "rejected": answers[1]}
        preference |= pair if len(answers) == 2 else {"ranking": answers}
    elif "correction" in opinion:
        good = opinion["correction"]
        if not good.strip() or good == opinion["answer"]:
            raise DataError("a correction must say something else.")
        preference |= {"chosen": good, "rejected": opinion["answer"]}
    else:
        is_good = opinion["vote"] == "up"
        good = opinion["answer"] if is_good else None
        preference |= {"completion": opinion["answer"], "label": is_good}
    lines = [(PREFERENCES, preference)]
    if good is not None:
        lines.append((CONVERSATIONS, {"messages": [*messages, {"role": "assistant", "content": good}]}))
    seen = {"model": model, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        (folder / OWN_FOLDER).mkdir(exist_ok=True)
        with FileLock(folder / OWN_FOLDER / "feedback.lock"):
            for name, values in lines:
                append_line(folder / name, orjson.dumps({**values, **seen}))
    except OSError as error:
        raise write_error(folder / PREFERENCES, error) from error
