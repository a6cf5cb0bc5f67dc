"""The bodies of requests, in the form of OpenAI's API. Every parameter has an effect or is refused by its name."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from stages.model.live import Sampling
from stages.runtime.errors import nearest

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": (),
    "functions": (),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": (),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters of OpenAI that this server does not have, and the values that ask for nothing, as null does."""

Text = Annotated[str, Field(max_length=200_000)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class Body(BaseModel):
    """What all bodies share: unknown parameters are refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise ValueError("the body holds half of a surrogate pair, which is not a character") from None
        known = cls.model_fields
        for name, value in body.items():
            if name in known or value is None or any(value == neutral for neutral in NEUTRAL.get(name, ())):
                continue
            if name in NEUTRAL:
                raise _wrong(name, f"this server does not support `{name}`; remove it")
            raise _wrong(name, f"there is no parameter `{name[:50]}`{nearest(name[:50], known)}")
        # A null means the same as a missing parameter.
        return {name: value for name, value in body.items() if name in known and value is not None}


def _wrong(param: str, text: str) -> PydanticCustomError:
    """An error that names the parameter to change."""
    return PydanticCustomError("parameter", "{text}", {"text": text, "param": param[:50]})


class Sampled(Body):
    """Parameters of sampling. Without `temperature` the model's generation config decides."""

    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in Sampled.model_fields})


def sampling(settings: Mapping[str, Any]) -> Sampling:
    """Settings of sampling that a person gave, with the bounds of a request.

    Raises:
        ValueError: with the first setting that is out of bounds, one sentence.
    """
    try:
        return Sampled.model_validate(dict(settings)).sampling
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"`{first['loc'][0]}`: {first['msg']}") from None


class StreamOptions(Body):
    include_usage: bool = False


class Asked(Sampled):
    """Parameters of both completions."""

    model: str | None = Field(None, max_length=200)
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    user: str | None = Field(None, max_length=200)
    """Written into the server's log beside the request."""

    @model_validator(mode="after")
    def _together(self) -> "Asked":
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "`stream_options` needs `stream: true`")
        return self

    @field_validator("stop", mode="wrap")
    @classmethod
    def _texts(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            stops = check(value)
        except ValidationError:
            stops = [""]
        texts = [stops] if isinstance(stops, str) else stops
        if any(not 0 < len(text) <= 500 for text in texts) or len(texts) > 16:
            raise ValueError("takes up to 16 texts of 1 to 500 characters")
        return stops

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Part(Body):
    """A part of a message's content; this server reads text."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"this server reads text alone; remove the part of type `{kind[:50]}`")
        return part


TAGS = ("(text)", "(parts)")
"""Marks of the forms of a content in the places of errors."""
Content = Annotated[
    Annotated[Text, Tag(TAGS[0])] | Annotated[list[Part], Tag(TAGS[1])],
    Discriminator(lambda value: TAGS[isinstance(value, list)]),
]


class Function(Body):
    name: str = Field(max_length=200)
    arguments: Text
    """JSON text."""


class Call(Body):
    id: str | None = Field(None, max_length=200)
    type: Literal["function"] = "function"
    function: Function


class ChatMessage(Body):
    """A message. Ids of calls are not written into the prompt, as in training."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = Field(None, max_length=200)
    refusal: None = None

    def as_row(self) -> dict[str, Any]:
        """As a row of a data set has it."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content
        row: dict[str, Any] = {"role": self.role, "content": text or ""}
        if self.tool_calls:
            row["tool_calls"] = [call.model_dump(exclude={"id"}) for call in self.tool_calls]
        return row


class ChatBody(Asked):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    tools: list[dict[str, Any]] = Field([], max_length=128)
    tool_choice: Literal["auto", "none"] = "auto"

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatBody":
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            text = "`max_tokens` and `max_completion_tokens` differ; they mean the same, so send one"
            raise _wrong("max_completion_tokens", text)
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionBody(Asked):
    """POST /v1/completions: plain text goes on, without the chat template."""

    prompt: Text | list[Text] | list[int] | list[list[int]]

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _texts_or_ids(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise ValueError("takes a text of up to 200,000 characters, token ids, or a list of them") from None

    @property
    def limit(self) -> int | None:
        return self.max_tokens


class InstructionBody(Sampled):
    """POST /generate: an instruction as a row of alpaca data has it."""

    instruction: Text = Field(min_length=1)
    input: Text = ""
    system: Text = ""
    model: str | None = Field(None, max_length=200)
    max_length: int | None = Field(None, ge=1, le=1_000_000)
    """Tokens of prompt and answer together, as in transformers' `generate`; with `max_new_tokens` both limits hold."""
    max_new_tokens: int | None = Field(None, ge=1, le=1_000_000)
