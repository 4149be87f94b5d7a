"""The fields of a user and what is valid in each, in a request as in a file.

The rules for passwords that depend on other fields are in `password_policy`.
"""

import re
import unicodedata
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from project.errors import InvalidPayload
from project.lib import codes, hashing
from project.models import MAX_STORED_USERNAME

MAX_NAME_LENGTH = 128  # characters, of a username and of an email

# https://html.spec.whatwg.org/multipage/input.html#valid-e-mail-address
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_EMAIL = re.compile(rf"[a-zA-Z0-9.!#$%&'*+/=?^_`{{|}}~-]+@{_LABEL}(?:\.{_LABEL})*")
_MAX_ROLE_LENGTH = 31  # characters
_ROLE = re.compile(rf"[a-z][a-z0-9_.:-]{{0,{_MAX_ROLE_LENGTH - 1}}}")
_ROLE_RULE = (
    f"must be different words of at most {_MAX_ROLE_LENGTH} characters of a-z, 0-9 and _.:-"
    " that begin with a letter"
)
MAX_ROLES = 16  # together they fit in the column
_REFUSED_CATEGORIES = {"Cc", "Cs"}  # control characters; surrogates, which UTF-8 cannot encode


def refuse(text: str) -> PydanticCustomError:
    """Return the error that a validator raises; `text` says what the value must be."""
    # pydantic formats the text as a template, so it must contain no braces.
    return PydanticCustomError("refused", text)


def has_controls(text: str) -> bool:
    """Return whether `text` has a control character or a surrogate in it."""
    if text.isprintable():
        return False
    return not _REFUSED_CATEGORIES.isdisjoint(map(unicodedata.category, text))


def _username(text: str) -> str:
    if has_controls(text):
        raise refuse("must not contain control characters")
    trimmed = text.strip()
    # Normalizing takes time in the square of the length, so the length of the column comes first.
    if len(trimmed) <= MAX_STORED_USERNAME:
        normalized = unicodedata.normalize("NFKC", trimmed).strip()
        if 1 <= len(normalized) <= MAX_NAME_LENGTH:
            return trimmed
    raise refuse(f"must have 1 to {MAX_NAME_LENGTH} characters")


def _email(text: str) -> str:
    if len(text) > MAX_NAME_LENGTH:
        raise refuse(f"must have at most {MAX_NAME_LENGTH} characters")
    if not _EMAIL.fullmatch(text):
        raise refuse("must be an email address")
    return text.lower()


def _password(text: str) -> str:
    if not text:
        raise refuse("must not be empty")
    return text


def _new_password(text: str) -> str:
    if len(hashing.normalize(text).encode()) > hashing.MAX_BYTES:
        raise refuse(f"must have at most {hashing.MAX_BYTES} bytes")
    return text


def _code(text: str) -> str:
    try:
        return codes.parse(text)
    except ValueError:
        raise refuse(f"must be {codes.TOTP_DIGITS} digits, or a recovery code") from None


def _roles(roles: list[str]) -> list[str]:
    if len(roles) > MAX_ROLES:
        raise refuse(f"must have at most {MAX_ROLES} words")
    if "admin" in roles:
        raise refuse("must not have admin, which is set with the member admin")
    if len(set(roles)) < len(roles) or not all(map(_ROLE.fullmatch, roles)):
        raise refuse(_ROLE_RULE)
    return sorted(roles)  # their order means nothing


Username = Annotated[
    str,
    AfterValidator(_username),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_STORED_USERNAME}),
]
Email = Annotated[
    str,
    AfterValidator(_email),
    WithJsonSchema({"type": "string", "format": "email", "maxLength": MAX_NAME_LENGTH}),
]
Password = Annotated[
    str, AfterValidator(_password), WithJsonSchema({"type": "string", "minLength": 1})
]
Code = Annotated[str, AfterValidator(_code), WithJsonSchema({"type": "string"})]
Roles = Annotated[
    list[str],
    AfterValidator(_roles),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "string", "pattern": f"^{_ROLE.pattern}$"},
            "maxItems": MAX_ROLES,
            "uniqueItems": True,
        }
    ),
]
NewPassword = Annotated[
    Password,
    AfterValidator(_new_password),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": hashing.MAX_BYTES}),
]


class Body(BaseModel):
    """A JSON object with strict types: a number is no string. Unknown keys are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class NewUser(Body):
    """A user to register or to add."""

    username: Username
    email: Email
    password: NewPassword


def invalid_payload(error: ValidationError) -> InvalidPayload:
    """Return the refusal that says for each field what is wrong, without the value."""
    return InvalidPayload(errors={_field(detail): _reason(detail) for detail in error.errors()})


def _field(detail: Any) -> str:
    return str(detail["loc"][0]) if detail["loc"] else "body"


def _reason(detail: Any) -> str:
    match detail["type"]:
        case "missing":
            return "is required"
        case "string_type":
            return "must be a string"
        case "refused":
            return str(detail["msg"])
        case _:
            return str(detail["msg"]).removeprefix("Input ")
