"""Requests as JSON, refused where they hold anything unknown, and what is said of those that are wrong.

The description of a field says what is expected of it, to callers that got it wrong as well.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1)]
#: Letters of a wrong value that are told.
SHOWN = 40
#: Of one value alone.
ZERO = Annotated[float, Field(ge=0, le=0, strict=False)]
ONE = Annotated[int, Field(ge=1, le=1)]
TEXTS = "a text, or a list of them, none of them empty"
GREEDY = "left out: answers are greedy, one for each prompt"


class Asked(BaseModel):
    """Fields that all requests have."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str = Field(description="a name that /v1/models lists")
    user: str | None = Field(None, description="the caller's name, which is ignored")


class CompletionRequest(Asked):
    """A request for completions as OpenAI's; answers are greedy, and what would change that is refused."""

    prompt: Texts = Field(description=TEXTS)
    max_tokens: int | None = Field(None, ge=1, description="a whole number, 1 or more")
    temperature: ZERO = Field(0.0, description=f"0, or {GREEDY}")
    n: ONE = Field(1, description=f"1, or {GREEDY}")
    stream: Literal[False] = Field(
        False, description="false, or left out: answers are sent whole"
    )


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
ASKED = {"/v1/completions": CompletionRequest, "/v1/classify": ClassifyRequest}


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
    found = json.dumps(body[name])
    if len(found) > SHOWN:
        found = f"{found[:SHOWN]}..."
    return f"{name} is {found}; expected {expected}."
