"""What clients may send, field by field, and the errors they get: OpenAI's names, types and JSON.

A field that is not listed here is refused by name, and so is a value outside of its range; null means that a field is
not there. Nothing is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from groundup.errors import ArtifactError, GroundupError
from groundup.generation import Constraint, EngineBusy, SamplingParams

MOST_TEXTS = 128  # of one request: prompts times n


class APIError(GroundupError):
    """An error with its HTTP status.

    Args:
        status: of HTTP.
        message: what is wrong; it must not repeat what the client wrote at length.
        code: a word for programs.
        param: the field that is wrong.
        headers: of the response.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def value(self) -> dict[str, Any]:
        """As OpenAI's clients expect it."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        """As a whole response."""
        return json_response(self.value, self.status, self.headers)


def api_error(error: Exception) -> APIError:
    """What a client is told of an error: of its own fault the reason, of ours only that there is one."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        reason = "there is nothing at this address" if error.status_code == 404 else error.detail
        return APIError(error.status_code, f"{reason}.", **(error.headers or {}))
    if isinstance(error, EngineBusy):
        return APIError(503, error.message, "overloaded", retry_after="1")
    if isinstance(error, ArtifactError):  # a request has no part in it
        return APIError(500, error.message, "model_error")
    if isinstance(error, TimeoutError):
        return APIError(504, "the answer took longer than this server allows.", "timeout")
    if isinstance(error, GroundupError):
        return APIError(400, " ".join(str(error).split("\n")))
    return APIError(500, "the server failed; its log says where.", "internal_error")


def _invalid(error: ValidationError) -> APIError:
    """The first few problems, without the values."""
    problems, first = [], ""
    for one in error.errors(include_input=False, include_url=False, include_context=False)[:4]:
        # Of a field that may be one of several types, pydantic adds the type's name.
        place = [str(part) for part in one["loc"] if not (isinstance(part, str) and ("[" in part or part in _TYPES))]
        name = ".".join(place)
        first = first or name
        unknown = one["type"] == "extra_forbidden"
        problems.append(f"{name[:80]}: {'is not supported' if unknown else one['msg'][:200]}".removeprefix(": "))
    return APIError(400, "; ".join(dict.fromkeys(problems)) + ".", "invalid_value", first[:80] or None)


_TYPES = {"str", "int", "float", "bool", "list", "dict", "NamedChoice", "constrained-str", "constrained-int"}


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A value as JSON."""
    return Response(orjson.dumps(value), status, headers, "application/json")


async def read_body(request: Request) -> Any:
    """The JSON of a request.

    Raises:
        APIError: another content type (which a form of a web page elsewhere could send), or not JSON.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise APIError(415, "the content type must be application/json.", "unsupported_media_type")
    try:
        return orjson.loads(await request.body())
    except orjson.JSONDecodeError as error:
        raise APIError(400, f"the body is not JSON: {str(error)[:120]}.", "invalid_json") from None


async def check_connected(request: Request) -> None:
    """Work for nobody is not begun.

    Raises:
        APIError: the client has left.
    """
    if await request.is_disconnected():
        raise APIError(400, "the client left before its answer.", "incomplete")


class Body(BaseModel):
    """What is sent: strictly typed, nothing unknown, null as if it were not there."""

    model_config = ConfigDict(
        extra="forbid", strict=True,
        # Clients send back what they were sent, with every field that they know: null is no request for anything.
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )  # fmt: skip
    one_of: ClassVar[tuple[str, ...]] = ()  # of which one must be given

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if self.one_of and sum(getattr(self, name) is not None for name in self.one_of) != 1:
            raise ValueError(f"give {', '.join(self.one_of[:-1])} or {self.one_of[-1]}")
        return self


Token = Annotated[int, Field(ge=0, lt=2**31)]
_Tokens = Annotated[list[Token], Field(min_length=1)]
_Several = Field(min_length=1, max_length=MOST_TEXTS)
Prompts = str | Annotated[list[str], _Several] | _Tokens | Annotated[list[_Tokens], _Several]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(Body):
    """What a stream holds besides the text."""

    include_usage: bool | None = None


class SamplingBody(Body):
    """How texts are drawn: OpenAI's names, and those of `SamplingParams` for what OpenAI does not have."""

    model: str | None = Field(None, description="One of /v1/models; without it the first.")
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="Most tokens to write.")
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the most probable token.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_TEXTS, description="Texts to write.")
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed gives the same text.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        Field(None, max_length=1024)
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="Users share a server's time fairly, and no cache.")
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream = true")
        return self

    def params(self, max_tokens: int, logprobs: int | None, constraint: Constraint | None) -> SamplingParams:
        """As the engine takes them.

        Raises:
            GroundupError: a value that does not fit the others.
        """
        same = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
                "frequency_penalty", "n", "min_tokens", "ignore_eos")  # fmt: skip
        given = {name: value for name in same if (value := getattr(self, name)) is not None}
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return SamplingParams(
            max_tokens=max_tokens, logprobs=logprobs, constraint=constraint, stop=stop,
            seed=None if self.seed is None else self.seed % 2**63,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            stop_ids=tuple(self.stop_token_ids or ()), **given,
        )  # fmt: skip


class CompletionBody(SamplingBody):
    """/v1/completions."""

    prompt: Prompts = Field(description="Texts or token ids, one or several.")
    echo: bool | None = Field(None, description="The prompt stands before each text, with its log-probabilities.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Of each token, and so many of the most probable.")
    add_special_tokens: bool | None = Field(None, description="Texts begin as documents do (default: true).")


class TextPart(Body):
    """A part of a message; there are no images."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """Which function, with JSON text as arguments."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str
    parsed_arguments: Any = Field(None, exclude=True)  # what OpenAI's client adds to an answer and sends back with it


class ToolCallBody(Body):
    """A call that the assistant made earlier."""

    id: str = Field(max_length=256)
    type: Literal["function"] | None = None
    function: CalledFunction
    index: int | None = Field(None, exclude=True)


class MessageBody(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: Annotated[list[ToolCallBody], Field(max_length=128)] | None = None
    tool_call_id: str | None = Field(None, max_length=256)
    parsed: Any = Field(None, exclude=True)
    annotations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, exclude=True)


class FunctionBody(Body):
    """A function that the assistant may call."""

    name: str = Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.\-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    """A tool: always a function."""

    type: Literal["function"]
    function: FunctionBody


class ChosenFunction(Body):
    """The name of a function."""

    name: str


class NamedChoice(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class SchemaBody(Body):
    """A JSON schema and its name."""

    name: str
    description: str | None = None
    strict: bool | None = None
    # Under another name in Python: pydantic's models have a method of this one.
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Body):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema belongs to type = "json_schema"')
        return self

    @property
    def constraint(self) -> Constraint | None:
        """As the engine takes it."""
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema is not None else {"type": "object"}
        return Constraint.json_schema(schema or {})


class ChatBody(SamplingBody):
    """/v1/chat/completions."""

    messages: list[MessageBody] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="As max_tokens.")
    answer_ids: _Tokens | None = Field(
        None, description="Token ids that the answer begins with: only what follows is sent."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolBody], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _chat_fits_together(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedChoice) else None
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if named is not None and named not in [tool.function.name for tool in self.tools or ()]:
            raise ValueError("tool_choice names no function of tools")
        if self.tools and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("response_format and tools cannot be combined")
        return self


class EmbeddingsBody(Body):
    """/v1/embeddings."""

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = Field(None, max_length=256)


class TokenizeBody(Body):
    """/tokenize: a text, or a conversation as the model would read it."""

    one_of = ("prompt", "messages")
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.messages is not None and self.add_special_tokens is not None:
            raise ValueError("add_special_tokens belongs to prompt")
        return self


class DetokenizeBody(Body):
    """/detokenize."""

    model: str | None = None
    tokens: list[Token] = Field(max_length=2**20)


Answer = Annotated[str, Field(max_length=200_000)]


class InspectBody(Body):
    """/inspect: a plain text, a conversation up to the assistant's turn, or token ids."""

    one_of = ("prompt", "messages", "tokens")
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=4096)] | None = None
    tokens: _Tokens | None = None
    top: int | None = Field(None, ge=1, le=50, description="Alternatives of each token (default: 10).")
    position: int | None = Field(None, ge=0, description="Whose next token's logits are given whole (default: last).")
    attention: bool | None = Field(None, description="With the attention of every layer and head (default: true).")


class CalculatorBody(Body):
    """/calculator."""

    answer: Answer = Field(description="What a model wrote.")


class TurnBody(Body):
    """A turn of a conversation, as text."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class FeedbackBody(Body):
    """/feedback: what somebody thinks of the answers to a conversation."""

    one_of = ("vote", "correction", "ranking")
    model: str | None = None
    messages: Annotated[list[TurnBody], Field(min_length=1, max_length=4096)]
    answer: Answer | None = None
    vote: Literal["up", "down"] | None = None
    correction: Answer | None = None
    ranking: Annotated[list[Answer], Field(min_length=2, max_length=16)] | None = Field(None, description="Best first.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.answer is None) != (self.ranking is not None):
            raise ValueError("vote and correction need answer, and ranking has none")
        return self
