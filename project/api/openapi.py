"""The API document (OpenAPI 3.1).

flask-openapi3 generates paths, parameters, request bodies, tags and security from the routes.
`Blueprint` adds the responses that views and guards declare (`responses.returns` and
`responses.raises`), with the examples in examples.json.

Client generators decide its form. Responses may gain members, so no schema of a response excludes
others. All errors share three schemas, which differ in their members and in the values of `code`;
the description and the examples of a response say which codes it has.
"""

import inspect
from collections.abc import Callable, Iterable
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

import orjson
from flask_openapi3 import APIBlueprint, Info, OpenAPI, Schema, Tag
from flask_openapi3.types import ParametersTuple, SecuritySchemesDict
from flask_openapi3.utils import get_model_schema
from pydantic import BaseModel, ValidationError

from project import errors
from project.accounts import fields, verification
from project.api import error_handlers, guards, schemas
from project.api.requests import FORM
from project.api.responses import Responses, failure
from project.config import VERSION
from project.errors import ServiceError

INFO = Info(
    title="Users service",
    version=VERSION,
    description="""\
Requests and responses are JSON. The `status` of a response is `success`, or `error` where the
request was refused (`fail` where an endpoint of `/users` refused it). An error has a `message` for
people and a `code` for programs.

An unknown path is a 404 `not_found`. A method that a path does not support is a 405
`method_not_allowed`, with the supported methods in `Allow`. A 429 or 503 has `Retry-After`, in
seconds. Every response has the request ID that the log has, in `X-Request-ID`; a 5xx has it in
`request_id` too.

A registration and a request with the current password have `RateLimit-Policy` and `RateLimit`
(draft-ietf-httpapi-ratelimit-headers-10). A login and a refresh have only `Retry-After`.

To send authenticated requests from this page, log in, press *Authorize* and enter the `auth_token`.
""",
)
SECURITY_SCHEMES: SecuritySchemesDict = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "The `auth_token` of a login, a registration or a refresh.",
    },
    "client": {
        "type": "http",
        "scheme": "basic",
        "description": "The name and the secret of another service, as an OAuth client.",
    },
}

_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
_REQUEST_ID_HEADER = {
    "description": "The request ID, as in the log: the one that the request sent, or a new one.",
    "schema": _STRING,
}
_LINK = {"description": "The next page, if there is one (RFC 8288).", "schema": _STRING}
_ETAG = {"description": "The version of the user, for `If-Match` of a change.", "schema": _STRING}
_ETAG_OF_KEYS = {"description": "For `If-None-Match` (RFC 9110, 13.1.2).", "schema": _STRING}
_CACHE_CONTROL = {"description": "How long the answer may be kept.", "schema": _STRING}
_LOCATION = {"description": "The path of the user.", "schema": _STRING}
_TO_PAGE = {"Location": {"description": "The path of the page.", "schema": _STRING}}
_HEADERS_BY_MODEL = {
    schemas.OneUser: {"ETag": _ETAG},
    schemas.ChangedUser: {"ETag": _ETAG},
    schemas.AddedUser: {"Location": _LOCATION},
    schemas.KeySet: {"ETag": _ETAG_OF_KEYS, "Cache-Control": _CACHE_CONTROL},
    schemas.Revocations: {},  # no `Link`: the feed has no last page
}
_CHALLENGE = {
    "WWW-Authenticate": {
        "description": "How to authenticate (RFC 9110, 11.6.1).",
        "schema": _STRING,
    }
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": _INTEGER}}
_HEADERS_BY_STATUS = {401: _CHALLENGE, 429: _RETRY_AFTER, 503: _RETRY_AFTER}
# Requests and responses as they were sent once, by operation ID.
_EXAMPLES = orjson.loads(Path(__file__).with_name("examples.json").read_bytes())
_EXAMPLE_REQUEST_ID = "c5e1f4581461cd7d0dc9bfd2d9c1059f"
_WITH_ERRORS = {
    errors.InvalidPayload,
    errors.UserExists,
    errors.EmailExists,
    errors.UsernameExists,
}
_MESSAGE = {"type": "string", "description": "A text for people, which may change."}
_ERROR_STATUS = {
    "type": "string",
    "enum": ["error", "fail"],
    "description": "`fail` where a view of `/users` refused the request, otherwise `error`.",
}
_MFA_TOKEN = {
    "type": "string",
    "description": "For the second step of a login; included if a login is refused with"
    " `mfa_required`.",
}
_OAUTH_ERROR = {"type": "string", "description": "On routes of OAuth: RFC 6749, 5.2."}
_ERRORS: dict[str, tuple[str, dict[str, Any]]] = {
    "Error": ("The request was refused.", {}),
    "FieldError": (
        "Values in the request are invalid or taken.",
        {
            "errors": {
                "type": "object",
                "description": "The reason for each field, or for the whole `body`.",
                "additionalProperties": _STRING,
            }
        },
    ),
    "ServerError": (
        "The service failed, or cannot answer now.",
        {"request_id": {"type": "string", "description": "The request ID, as in X-Request-ID."}},
    ),
}
# The fields with a new password, whose minimum length is a setting.
_NEW_PASSWORDS = (
    ("NewUser", "password"),
    ("PasswordChange", "new_password"),
    ("PasswordReset", "new_password"),
    ("AcceptedInvitation", "password"),
)
# The routes that answer 202 with some settings only. Typed clients for other settings need not
# handle it.
_ACCEPTED_IF = {
    ("/auth/register", "post"): verification.is_required,
    ("/users/{user_id}", "patch"): verification.changes_are_confirmed,
}
_OPTIONAL_BODIES = {("/users/{user_id}", "delete"), ("/users/{user_id}/totp", "delete")}
_FORMS = {"/oauth/token", "/oauth/introspect", "/oauth/revoke"}
_NO_TOKEN: dict[str, list[str]] = {}
_TOKEN_OPTIONAL = {guards.admin_unless_open, guards.admin_or_self_unless_open}


class Blueprint(APIBlueprint):
    """A blueprint whose routes are documented with what their views and guards declare."""

    def __init__(self, name: str, description: str, url_prefix: str | None = None) -> None:
        """Document every route under the tag `name`, which has this description."""
        tag = Tag(name=name, description=description)
        super().__init__(name, __name__, url_prefix=url_prefix, abp_tags=[tag])

    def _collect_openapi_info(
        self, rule: str, func: Callable[..., Any], **options: Any
    ) -> ParametersTuple:
        """Document a route as flask-openapi3 does, and add responses, security and operation ID.

        The library calls this method, which it keeps private, when a view is decorated. Raises
        LookupError for a view without `responses.returns`.
        """
        declared: Responses | None = getattr(func, "responses", None)
        if declared is None:
            raise LookupError(f"{rule}: {func.__name__} declares no responses (@responses.returns)")
        view_guards = getattr(func, "guards", ())
        takes = get_type_hints(func)
        operation_id = options["operation_id"] or func.__name__
        responses = {
            # The recorded example of an operation is that of the first status.
            status: self._success_response(model, f"{operation_id}{suffix}", takes)
            for (status, model), suffix in zip(declared.models.items(), ("", "_202"), strict=False)
        }
        refusals = _refusals(declared, view_guards, takes)
        for status, group in groupby(refusals, key=attrgetter("status")):
            responses[status] = self._refusal_response(status, group, takes)
        if schemas.KeySet in declared.models.values():
            responses[304] = {"description": "The client has this version already."}
        if schemas.Service in declared.models.values():
            responses[303] = {"description": "To the page, for a browser.", "headers": _TO_PAGE}
        options |= {
            "operation_id": operation_id,
            # The library would join the lines of the docstring with <br/>.
            "description": inspect.cleandoc(func.__doc__ or "").partition("\n")[2].strip(),
            "security": _security(view_guards),
            "responses": responses,
        }
        return super()._collect_openapi_info(rule, func, **options)

    def _success_response(
        self, model: type[BaseModel], operation_id: str, takes: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the response of a successful request, with its recorded example."""
        schema = get_model_schema(model, mode="serialization")
        for name, definition in {model.__name__: schema, **schema.get("$defs", {})}.items():
            self.components_schemas[name] = Schema(**definition)
        is_page = "limit" in getattr(takes.get("query"), "model_fields", ())
        headers = _HEADERS_BY_MODEL.get(model, {"Link": _LINK} if is_page else {})
        content: dict[str, Any] = {"schema": _reference(model.__name__)}
        if example := _EXAMPLES.get(operation_id):
            content["example"] = example["answer"]
        return {
            "description": inspect.getdoc(model),
            "headers": dict(headers),
            "content": {"application/json": content},
        }

    def _refusal_response(
        self, status: int, alternatives: Iterable[type[ServiceError]], takes: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the response of one status, with an example of each error by its code."""
        by_code = {refusal.code: refusal for refusal in alternatives}
        examples = {}
        for code, refusal in by_code.items():
            answer = failure(
                refusal(errors=_example_errors(refusal, takes)),
                error_handlers.envelope_status(refusal, self.name),
                _EXAMPLE_REQUEST_ID,
                error_handlers.oauth_error(refusal, self.name),
            )
            examples[code] = {"value": answer.get_json()}
        # Validators and generated clients try the schemas in order: the more exact ones first.
        names = sorted({_error_schema(refusal) for refusal in by_code.values()}, reverse=True)
        references = [_reference(name) for name in names]
        schema = references[0] if len(references) == 1 else {"anyOf": references}
        lines = [f"`{code}`: {refusal.message}" for code, refusal in by_code.items()]
        return {
            "description": "\n\n".join(lines),
            "headers": _HEADERS_BY_STATUS.get(status, {}),
            "content": {"application/json": {"schema": schema, "examples": examples}},
        }


def describe(app: OpenAPI, origin: str = "") -> dict[str, Any]:
    """Return the API document of `app`, for its settings.

    `origin` is where clients find the service; by default, where they found the document.
    """
    document: dict[str, Any] = _simplified(app.api_doc)
    document["servers"] = [_server(origin)]
    components = document["components"]
    components["headers"] = {"X-Request-ID": _REQUEST_ID_HEADER}
    components["schemas"] |= _error_schemas()
    components["schemas"]["Error"]["properties"]["mfa_token"] = _MFA_TOKEN
    for name, field in _NEW_PASSWORDS:
        new_password = components["schemas"][name]["properties"][field]
        new_password["minLength"] = app.config["PASSWORD_MIN_LENGTH"]
    with app.app_context():
        for (path, method), can_answer_202 in _ACCEPTED_IF.items():
            if not can_answer_202():
                del document["paths"][path][method]["responses"]["202"]
    # The library adds a 422 to every operation; this service answers 400 to an invalid request.
    components["schemas"].pop(app.validation_error_model.__name__, None)
    if app.config["ISSUER"]:
        for name in _ERRORS:
            components["schemas"][name]["properties"]["error"] = _OAUTH_ERROR
    else:
        del components["securitySchemes"]["client"]
    for path, method in _OPTIONAL_BODIES:
        document["paths"][path][method]["requestBody"]["required"] = False
    for path in _FORMS & document["paths"].keys():
        content = document["paths"][path]["post"]["requestBody"]["content"]
        content[FORM] = content.pop("application/json")
    for operation in chain.from_iterable(path.values() for path in document["paths"].values()):
        operation["responses"].pop(app.validation_error_status, None)
        for response in operation["responses"].values():
            reference = {"$ref": "#/components/headers/X-Request-ID"}
            response.setdefault("headers", {})["X-Request-ID"] = reference
        if example := _EXAMPLES.get(operation["operationId"], {}).get("request"):
            (content,) = operation["requestBody"]["content"].values()
            content["example"] = example
        # The library leaves out an empty list.
        security = operation.setdefault("security", [])
        if not app.config["USERS_API_OPEN"] and _NO_TOKEN in security:
            security.remove(_NO_TOKEN)
    return document


def _server(origin: str) -> dict[str, Any]:
    """Return the server, whose URL is relative if `origin` is empty.

    Tools that need an absolute URL, such as Postman, ask for the variable. A URL of "/" would not
    do: generated clients put it in front of each path, and "//auth/login" is on the host "auth".
    """
    description = "Scheme, host and port. If empty, those from which this document was loaded."
    return {
        "url": "{origin}",
        "description": "The service.",
        "variables": {"origin": {"default": origin, "description": description}},
    }


def _simplified(part: Any) -> Any:
    """Return a part of the document without generated titles, and with bounds as integers."""
    if isinstance(part, list):
        return [_simplified(each) for each in part]
    if isinstance(part, float):
        return int(part)
    if not isinstance(part, dict):
        return part
    generated = isinstance(part.get("title"), str) and "version" not in part  # not of `info`
    return {
        key: _simplified(value) for key, value in part.items() if not (generated and key == "title")
    }


def _refusals(
    declared: Responses, view_guards: tuple[Any, ...], takes: dict[str, Any]
) -> list[type[ServiceError]]:
    """Return every error that a route may answer with, by status and code."""
    refusals = {*declared.errors, errors.InternalError}
    for guard in view_guards:
        refusals |= set(guard.raises)
    if "body" in takes:
        refusals |= {errors.InvalidPayload, errors.PayloadTooLarge}
    if "query" in takes:
        refusals.add(errors.InvalidPayload)
    if not any(issubclass(model, schemas.Probe) for model in declared.models.values()):
        refusals |= {errors.DatabaseUnavailable, errors.HttpsRequired}
    return sorted(refusals, key=attrgetter("status", "code"))


def _security(view_guards: tuple[Any, ...]) -> list[dict[str, list[str]]]:
    """Return the security requirements of a route; the empty one makes the token optional."""
    if guards.client in view_guards:
        return [{"client": []}]
    if not any(errors.TokenInvalid in guard.raises for guard in view_guards):
        return []
    token_optional = not _TOKEN_OPTIONAL.isdisjoint(view_guards)
    return [{"bearer": []}, _NO_TOKEN] if token_optional else [{"bearer": []}]


def _example_errors(refusal: type[ServiceError], takes: dict[str, Any]) -> dict[str, str] | None:
    """Return the `errors` of an example: the answer to an empty body or an invalid query."""
    if refusal is not errors.InvalidPayload:
        return {"email": "is taken"} if refusal in _WITH_ERRORS else None
    model, invalid = takes.get("body", schemas.Confirmation), {}
    if model is schemas.OptionalCode:
        invalid = {"code": ""}
    if "query" in takes:
        model, invalid = takes["query"], dict.fromkeys(takes["query"].model_fields, "-")
    try:
        model.model_validate(invalid)
    except ValidationError as error:
        return fields.invalid_payload(error).errors
    raise LookupError(f"{model} accepts {invalid}")


def _error_schema(refusal: type[ServiceError]) -> str:
    """Return the name of the schema of the response to an error."""
    if refusal.status >= 500:
        return "ServerError"
    return "FieldError" if refusal in _WITH_ERRORS else "Error"


def _error_schemas() -> dict[str, Any]:
    """Return the schemas of errors; no two have a code in common."""
    schemas: dict[str, Any] = {"ErrorStatus": _ERROR_STATUS}
    for name, (description, properties) in _ERRORS.items():
        codes = _codes(name)
        meanings = [f"- `{code}`: {meaning}" for code, meaning in codes.items()]
        schemas[f"{name}Code"] = {
            "type": "string",
            "enum": list(codes),
            "description": "\n".join(meanings),
        }
        members = {
            "status": _reference("ErrorStatus"),
            "message": _MESSAGE,
            "code": _reference(f"{name}Code"),
            **properties,
        }
        schemas[name] = {
            "type": "object",
            "description": description,
            "properties": members,
            "required": list(members),
        }
    return schemas


def _codes(schema: str) -> dict[str, str]:
    """Return the codes of the errors that have this schema, each with its meaning."""
    codes: dict[str, str] = {}
    for error in filter(inspect.isclass, vars(errors).values()):
        if issubclass(error, ServiceError) and error is not ServiceError:
            meaning = (inspect.getdoc(error) or "").partition("\n")[0]
            if _error_schema(error) == schema:
                codes.setdefault(error.code, meaning)
    return codes


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
