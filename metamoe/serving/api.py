"""What requests may say, and what is answered: the forms of the OpenAI API, as far as they are kept to, and images."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _whole(text: str) -> str:
    """JSON can name halves of letters, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"no Unicode text: {error.reason}") from error
    return text


_Text = Annotated[str, Field(strict=True), AfterValidator(_whole)]
_Stop = Annotated[_Text, Field(min_length=1, max_length=256)]
_Class = Annotated[_Text, Field(min_length=1, max_length=200)]


class _Asked(BaseModel):
    """What both forms of text have. What is not here is refused, rather than ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: _Text
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    user: _Text | None = None
    truncate: bool = Field(False, description="a prompt that is too long loses its beginning, in place of being refused")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: bool = False


class CompletionAsked(_Asked):
    """``/v1/completions``."""

    prompt: _Text | Annotated[list[_Text], Field(min_length=1, max_length=64)]
    max_tokens: Annotated[int, Field(ge=1)] = 64

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Part(BaseModel):
    """A part of a message; there are none but texts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text"]
    text: _Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: _Text | Annotated[list[Part], Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatAsked(_Asked):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1_000)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatAsked":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same; give one of them")
        return self


class ClassifyAsked(BaseModel):
    """``/v1/classify``: images, each base64 or a data URL; among which classes (None: the model's); how many to name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: _Text
    images: Annotated[list[_Text], Field(min_length=1, max_length=64)]
    classes: Annotated[list[_Class], Field(min_length=1, max_length=10_000)] | None = None
    top: Annotated[int, Field(ge=1, le=1_000)] = 3


def error_body(message: str, code: str, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    """An error as clients of that API read it."""
    # What a request said may be no text at all, and is quoted.
    clean = message.encode("utf-8", "replace").decode()
    named = param.encode("utf-8", "replace").decode() if param else None
    return {"error": {"message": clean, "type": kind, "param": named, "code": code}}
