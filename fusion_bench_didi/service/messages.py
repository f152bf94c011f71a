"""Requests as JSON, refused where they hold anything unknown, and what is said of those that are wrong.

The description of a field says what is expected of it, to callers that got it wrong as well.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1)]
#: Letters of a wrong value that are told.
SHOWN = 40
#: Of one value alone.
ZERO = Annotated[float, Field(ge=0, le=0, strict=False)]
ONE = Annotated[int, Field(ge=1, le=1)]
TEXTS = "a text, or a list of them, none of them empty"
COUNT = "a whole number, 1 or more"
#: A role and what it says.
Message = dict[str, str]
ROLES = ("system", "user", "assistant")
MESSAGE = f"an object of role ({', '.join(ROLES)}) and content"
GREEDY = "left out: answers are greedy, one for each prompt"


def messages_of(given: list[Any]) -> list[Message]:
    """Messages as layouts of conversations take them; parts of one are its lines.

    Raises:
        ValueError: for what is no message of text, by its place.
    """
    return [_message(f"messages[{place}]", one) for place, one in enumerate(given)]


def _message(name: str, given: Any) -> Message:
    if isinstance(given, dict):  # as clients send back what they were answered
        given = {k: v for k, v in given.items() if v is not None or k == "content"}
    if not isinstance(given, dict) or given.keys() != {"role", "content"}:
        raise _unexpected(name, given, MESSAGE)
    role, content = given["role"], given["content"]
    if role == "developer":  # OpenAI's later name
        role = "system"
    if role not in ROLES:
        raise _unexpected(f"{name}.role", role, f"one of {', '.join(ROLES)}")
    if _is_text(content):
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise _unexpected(f"{name}.content", content, "a text, or a list of parts")
    for place, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) else None
        if part != {"type": "text", "text": text} or not _is_text(text):
            expected = '{"type": "text", "text": ...}: texts alone are read'
            raise _unexpected(f"{name}.content[{place}]", part, expected)
    return {"role": role, "content": "\n".join(part["text"] for part in content)}


def _is_text(value: Any) -> bool:
    """Whether it is a text of whole characters, which JSON can hold halves of."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _unexpected(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{name} is {_shown(value)}; expected {expected}.")


Messages = Annotated[list[Any], Field(min_length=1), AfterValidator(messages_of)]


#: Fields of OpenAI's with values that change no text, as JSON, which clients send.
_IDLE = {
    "top_p": "1",
    "presence_penalty": "0",
    "frequency_penalty": "0",
    "best_of": "1",
    "stop": "[]",
    "logprobs": "false",
    "echo": "false",
    "response_format": '{"type": "text"}',
}


class Asked(BaseModel):
    """Fields that all requests have; null is as good as left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_null(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {key: value for key, value in body.items() if value is not None}

    model: str = Field(description="a name that /v1/models lists")
    user: str | None = Field(None, description="the caller's name, which is ignored")


class Continued(Asked):
    """Fields of what is continued: answers are greedy, and what would change that is refused."""

    @model_validator(mode="before")
    @classmethod
    def without_idle(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        idle = {key for key in body.keys() & _IDLE if _IDLE[key] in _spellings(body[key])}  # fmt: skip
        return {key: value for key, value in body.items() if key not in idle}

    max_tokens: int | None = Field(None, ge=1, description=COUNT)
    temperature: ZERO = Field(0.0, description=f"0, or {GREEDY}")
    n: ONE = Field(1, description=f"1, or {GREEDY}")
    stream: Literal[False] = Field(
        False, description="false, or left out: answers are sent whole"
    )


class CompletionRequest(Continued):
    """A request for completions, as OpenAI's."""

    prompt: Texts = Field(description=TEXTS)


class ChatRequest(Continued):
    """A request for the next message of a conversation, as OpenAI's."""

    messages: Messages = Field(description=f"a list of messages, each {MESSAGE}")
    max_completion_tokens: int | None = Field(None, ge=1, description=COUNT)

    @property
    def tokens(self) -> int | None:
        """At most, however that is called."""
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def one(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("Give either max_completion_tokens, or max_tokens.")
        return self


class ClassifyRequest(Asked):
    """Texts, or images in base64, by what the model is given."""

    input: Texts | None = Field(None, description=TEXTS)
    image: Texts | None = Field(None, description=f"in base64 {TEXTS}")

    @model_validator(mode="after")
    def one(self) -> "ClassifyRequest":
        if (self.input is None) == (self.image is None):
            raise ValueError(
                "Give either input, of texts, or image, of images in base64."
            )
        return self


#: By the path that they are sent to.
ASKED = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/classify": ClassifyRequest,
}


def _spellings(value: Any) -> tuple[str, ...]:
    """A value as JSON; a whole number also where it is written with a point."""
    whole = isinstance(value, float) and value.is_integer()
    return (json.dumps(value), *([str(int(value))] if whole else []))


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def faults(errors: Sequence[Mapping[str, Any]], body: Any, asked: type[Asked]) -> str:
    """A sentence for every field that is wrong.

    Args:
        errors: of pydantic, whose places begin with the body.
        asked: what was expected.
    """
    return " ".join(dict.fromkeys(_fault(one, body, asked) for one in errors))


def _fault(error: Mapping[str, Any], body: Any, asked: type[Asked]) -> str:
    fields, kind = asked.model_fields, error["type"]
    if kind == "value_error":  # of our own
        return str(error["ctx"]["error"])
    if kind == "json_invalid" or len(error["loc"]) == 1:
        return f"The body is not a JSON object; send one with {', '.join(fields)} as application/json."
    name = error["loc"][1]  # what follows is where in its value, and as which type
    if name not in fields:
        return f"{name} is not known; a request holds {', '.join(fields)}."
    expected = fields[name].description
    if kind == "missing":
        return f"{name} is missing; expected {expected}."
    return str(_unexpected(name, body[name], str(expected)))


def _shown(value: Any) -> str:
    found = json.dumps(value)
    return found if len(found) <= SHOWN else f"{found[:SHOWN]}..."
