"""The engine that encodes text: a `tokenizer.json` without whatever could put a control token into the ids of a text.

Three parts of such a file can: added tokens, which are searched for in every text; the model's own vocabulary, in
which control tokens stand beside words; and the post-processor, which adds tokens around a text. So the post-processor
is left out, and every control token is renamed to something that no text can contain, as it is drawn at random when the
file is loaded. Whatever a normalizer or pre-tokenizer makes of a text, the model then knows no way to a control token.

Also left out: truncation, padding, and dropout, with which the same text would have other ids every time.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Any


def text_spec(spec: dict[str, Any], control: Collection[str]) -> dict[str, Any]:
    """What encodes text.

    Args:
        spec: the contents of `tokenizer.json`, as the engine writes them.
        control: names of the control tokens.
    """
    key = secrets.token_hex(16)
    hidden = {name: f"{key} {place}" for place, name in enumerate(control)}
    model = {**spec["model"], "dropout": None} if "dropout" in spec["model"] else dict(spec["model"])
    if isinstance(model["vocab"], dict):
        known = set(model["vocab"])
        model["vocab"] = {hidden.get(token, token): index for token, index in model["vocab"].items()}
    else:  # Unigram's
        known = {token for token, _ in model["vocab"]}
        model["vocab"] = [[hidden.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        mark = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if hidden.keys().isdisjoint((left, right, left + right, left + right.removeprefix(mark)))
        ]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    added = [
        {**token, "content": hidden.get(token["content"], token["content"])}
        for token in spec["added_tokens"]
        if token["content"] not in hidden or token["content"] not in known  # those behind the vocabulary keep their ids
    ]
    nothing = dict.fromkeys(("post_processor", "truncation", "padding"))
    return {**spec, "model": model, "added_tokens": added, **nothing}
