"""Requests as JSON, refused where they hold anything unknown."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1)]


class Asked(BaseModel):
    """What all requests have."""

    model_config = ConfigDict(extra="forbid", strict=True)
    #: a task, or ``routed``
    model: str
    #: of the caller's, ignored
    user: str | None = None


class CompletionRequest(Asked):
    """As of OpenAI's completions; answers are greedy, and what would change that is refused."""

    prompt: Texts
    max_tokens: Annotated[int, Field(ge=1)] = 16
    temperature: Annotated[float, Field(ge=0, le=0, strict=False)] = 0.0
    n: Annotated[int, Field(ge=1, le=1)] = 1
    stream: bool = False

    @model_validator(mode="after")
    def whole(self) -> "CompletionRequest":
        if self.stream:
            raise ValueError("stream: answers are sent whole; leave it out")
        return self


class ClassifyRequest(Asked):
    """Texts, or images in base64, by what the model is given."""

    input: Texts | None = None
    image: Texts | None = None

    @model_validator(mode="after")
    def one(self) -> "ClassifyRequest":
        if (self.input is None) == (self.image is None):
            raise ValueError("give input (texts) or image (base64), one of them")
        return self


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
