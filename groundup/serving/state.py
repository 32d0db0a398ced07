"""What a server holds: its models, each with an engine of its own, and how much it lets its clients do."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundup.generation import Engine, prompt_ids
from groundup.model import Transformer
from groundup.serving.metrics import Metrics
from groundup.serving.protocol import APIError, Prompts
from groundup.serving.templates import ChatTemplate
from groundup.tokenizer import Tokenizer


@dataclass(frozen=True)
class Limits:
    """How much is too much.

    Attributes:
        body_bytes: of a request.
        body_seconds: for its headers, and again for its body, to arrive.
        seconds: for an answer.
        requests: that are answered at the same time; more get 503.
        per_minute: requests of one key (or, without keys, address); more get 429; None: any number.
        unread: chunks of a stream that wait for a slow reader, before it is cut off, for each of its texts.
    """

    body_bytes: int = 2_000_000
    body_seconds: float = 30
    seconds: float = 600
    requests: int = 128
    per_minute: int | None = None
    unread: int = 1024


@dataclass(eq=False)
class ServedModel:
    """A model under a name.

    Attributes:
        name: that clients choose it by.
        engine: of the model, with its tokenizer.
        folder: where it was read from.
        created: when, in seconds since 1970.
    """

    name: str
    engine: Engine
    folder: Path | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> Transformer:
        """With its whole weights."""
        return self.engine.model

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model."""
        assert self.engine.tokenizer is not None, "a served model has a tokenizer"
        return self.engine.tokenizer

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The layout of its conversations."""
        return ChatTemplate(self.tokenizer)

    def prompts(self, given: Prompts, field: str, *, is_begun: bool = True) -> list[list[int]]:
        """Token ids of one text or several, or of what are ids already.

        Args:
            given: what was sent.
            field: where.
            is_begun: texts begin as documents do.

        Raises:
            APIError: an id that the model does not have, or too many.
        """
        several: Sequence[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        encode = functools.partial(prompt_ids, self.tokenizer) if is_begun else self.tokenizer.encode
        found = [encode(one) if isinstance(one, str) else list(one) for one in several]
        if (largest := max(map(max, filter(None, found)), default=0)) >= (size := self.model.config.vocab_size):
            raise APIError(400, f"{field} has the token id {largest}: the model has 0 to {size - 1}.", param=field)
        for ids in found:
            self.check_length(ids, field)
        return found

    def check_length(self, ids: Sequence[int], field: str) -> None:
        """Refuse what does not fit into the context.

        Raises:
            APIError: with the code that clients know.
        """
        if len(ids) > (length := self.engine.length):
            raise APIError(
                400, f"{field} has {len(ids)} tokens; this model's maximum context length is {length}.",
                "context_length_exceeded", field,
            )  # fmt: skip

    @functools.cached_property
    def token_texts(self) -> list[str]:
        """Each token as text; one that is no whole characters as `bytes:\\xe6\\x9d`, as OpenAI writes it."""
        named = self.tokenizer.vocab()
        texts = [named.get(index, b"") for index in range(self.model.config.vocab_size)]
        return [text if isinstance(text, str) else _shown(text) for text in texts]


def _shown(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)


class State:
    """All that a request may need.

    Args:
        models: the first is taken where a request names none.
        limits: for all clients together, and each.
        keys: any one opens the server; none: it is open.
        hosts: names by which browsers may call it, beside localhost and addresses.
        run: the folder of the run that the models are of.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        limits: Limits | None = None,
        keys: Sequence[str] = (),
        hosts: Sequence[str] = (),
        run: Path | None = None,
    ) -> None:
        self.models: Mapping[str, ServedModel] = {one.name: one for one in models}
        self.limits, self.keys, self.run = limits or Limits(), tuple(keys), run
        self.hosts = {name.lower() for name in hosts}
        self.metrics = Metrics({one.name: one.engine for one in models})

    @property
    def is_ready(self) -> bool:
        """All engines take steps."""
        return all(one.engine.is_alive for one in self.models.values())

    def find(self, name: str | None) -> ServedModel:
        """The model of a name; without one the first.

        Raises:
            APIError: there is none of that name, or its engine has stopped.
        """
        found = next(iter(self.models.values()), None) if name is None else self.models.get(name)
        if found is None:
            raise APIError(404, f"model: there is none of this name; there are {', '.join(self.models)}.",
                           "model_not_found", "model")  # fmt: skip
        if not found.engine.is_alive:
            raise APIError(503, f"the engine of {found.name} has stopped.", "unavailable", retry_after="10")
        return found
