"""What may be asked: OpenAI's request bodies, and three fields of our own (`top_k`, `repetition_penalty`, `experts`).

Nothing is silently ignored: a field that is unknown, or asks for what this server cannot do, is refused by name. Left out,
null and the value that asks for nothing are the same.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scripts.serving.errors import ApiError, bad_request

# Fields that ask for what is not there, and the values by which they ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "echo": (False,), "function_call": ("none",), "functions": ([],), "logit_bias": ({},),
    "modalities": (["text"],), "parallel_tool_calls": (True, False), "prediction": (),
    "reasoning_effort": ("none",), "response_format": ({"type": "text"},), "service_tier": ("auto", "default"),
    "store": (False,), "suffix": ("",), "tool_choice": ("none", "auto"), "tools": ([],), "verbosity": ("medium",),
    "web_search_options": (),
}  # fmt: skip

StopString = Annotated[str, Field(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(ge=0)]
# Lists fail fast: of a megabyte's million mistakes only the first is told, and gathering all took 10 s and 1 GiB.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]


class Strict(BaseModel):
    """No conversions between types; unknown fields are kept, to be refused by name."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Part(Strict):
    """A part of a message whose content is a list: text alone is taken."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, fail_fast=True)]
    name: None = None
    refusal: None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    """OpenAI's stream_options."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Request(Strict):
    """What both endpoints take."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # an upper bound, as is the context
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None  # 1
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None  # 1
    n: Annotated[int, Field(ge=1)] | None = None  # 1; choice i is drawn with seed + i
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None  # another for every request
    stop: StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None  # 0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None  # 0
    user: str | None = None  # labels, which ask for nothing
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    # Ours:
    top_k: Annotated[int, Field(ge=0)] | None = None  # 0: all
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None  # 1
    experts: bool | None = None  # tell, under `minimoe`, which experts read each new token

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def limit(self) -> int | None:
        return self.max_tokens


class ChatRequest(Request):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def reported_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request):
    """Body of /v1/completions."""

    # Token ids are taken as they are, text behind a <|bos|>.
    prompt: (
        str | Annotated[list[str], Field(fail_fast=True)] | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def reported_logprobs(self) -> int | None:
        return self.logprobs


AnyRequest = TypeVar("AnyRequest", bound=Request)


def parse(body: bytes, schema: type[AnyRequest]) -> AnyRequest:
    """The request in a body. Raises ApiError 400 naming the field."""
    try:
        request = schema.model_validate_json(body)
    except ValidationError as error:
        raise _named(error) from None
    _refuse_extra(request, "")
    if isinstance(request, ChatRequest):
        for i, message in enumerate(request.messages):
            _refuse_extra(message, f"messages[{i}].")
            for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
                _refuse_extra(part, f"messages[{i}].content[{j}].")
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            raise bad_request("max_tokens", "is the old name of max_completion_tokens: give one of the two")
        if request.top_logprobs is not None and not request.logprobs:
            raise bad_request("top_logprobs", "needs logprobs: true")
    if request.stream_options is not None:
        _refuse_extra(request.stream_options, "stream_options.")
        if not request.stream:
            raise bad_request("stream_options", "is for stream: true alone")
    return request


def _named(error: ValidationError) -> ApiError:
    """pydantic's deepest complaint as ours: its place as a path; a union's branches complain of the same place."""
    complaints = error.errors(include_url=False, include_context=False, include_input=False)
    if complaints[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {complaints[0]['msg'].partition(': ')[2]}")
    depth = max(len(complaint["loc"]) for complaint in complaints)
    path = ""
    messages: list[str] = []
    for complaint in complaints:
        if len(complaint["loc"]) == depth:
            path = path or _path(complaint["loc"])
            if _path(complaint["loc"]) == path:
                messages.append(complaint["msg"][0].lower() + complaint["msg"][1:])
    if not path:
        return ApiError(400, "the body must be a JSON object")
    return bad_request(path, ", or ".join(dict.fromkeys(messages)))


def _path(place: tuple[int | str, ...]) -> str:
    """("messages", 0, "content", "list[Part]", 1, "text") -> messages[0].content[1].text."""
    path = ""
    for step in place:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step not in ("str", "int"):  # the others are the names of a union's branches
            path += f".{step}" if path else step
    return path


def _refuse_extra(part: Strict, path: str) -> None:
    for name, value in (part.model_extra or {}).items():
        if value is None:
            continue
        if path or name not in UNSUPPORTED:
            raise ApiError(
                400, f"{path}{name[:80]}: no such field here", param=f"{path}{name[:80]}", code="unknown_parameter"
            )
        if not any(type(value) is type(nothing) and value == nothing for nothing in UNSUPPORTED[name]):
            raise ApiError(
                400, f"{name}: this server cannot do that; leave it out", param=name, code="unsupported_parameter"
            )
