"""The document of the API (OpenAPI 3.1), made from the views, their guards, schemas and answers.

At /docs/openapi.json, with Swagger UI's page at /docs; both only where API_DOCS says so.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from http import HTTPStatus
from importlib import resources
from pathlib import Path
from typing import Any

import flask
import orjson
from flask import Blueprint, Flask, current_app, send_from_directory
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from werkzeug.routing import Rule

from project import errors
from project.api import answers, error_handlers, schemas
from project.api.answers import Answers
from project.api.responses import Response, failure

TITLE, VERSION = "Users service", "1.0.0"
_EXAMPLES = Path(__file__).with_name("examples.json")
_PAGE = Path(__file__).with_name("docs.html")
_SCRIPT = Path(__file__).with_name("docs.js")
_SWAGGER_UI = resources.files("flask_openapi3_swagger") / "templates" / "swagger"
# Swagger UI writes styles into its elements; all else comes from files of the service.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_REQUEST_ID = "c5e1f4581461cd7d0dc9bfd2d9c1059f"  # of an example
_REQUEST_ID_HEADER = "#/components/headers/X-Request-ID"
_WITH_ERRORS = {errors.InvalidPayload, errors.UserExists, errors.EmailExists}
_TAGS = {
    "auth": "Register, log in, and everything about the caller's own sessions.",
    "health": "Whether the process answers, and may be sent requests.",
    "users": "The users, and what happened to their accounts.",
}
_DESCRIPTION = """\
JSON in, JSON out. A success is `{"status": "success", ...}`; a refusal has `status` `error` (or
`fail`, where a view of `/users` refuses), a `message` for people and a `code` for programs.

An unknown address is a 404 `not_found`, a method that an address does not take a 405
`method_not_allowed` with `Allow`. A 429 or 503 has `Retry-After`, in seconds. Every answer has the
id under which the log has it in `X-Request-ID`, and where the service failed in `request_id` too.

Log in, press *Authorize*, and put the `auth_token` in.
"""

docs_blueprint = Blueprint("docs", __name__, url_prefix="/docs")


def init_app(app: Flask) -> None:
    """Serve document and page where API_DOCS says so."""
    if app.config["API_DOCS"]:
        app.register_blueprint(docs_blueprint)


@docs_blueprint.get("/openapi.json")
def get_document() -> flask.Response:
    """Answer with the document, which is made when it is first asked for."""
    if "document" not in current_app.extensions:
        current_app.extensions["document"] = orjson.dumps(describe(current_app))
    return Response(current_app.extensions["document"])


@docs_blueprint.get("")
def get_page() -> flask.Response:
    """Answer with the page."""
    return _looser(Response(_PAGE.read_bytes()), "text/html; charset=utf-8")


@docs_blueprint.get("/docs.js")
def get_script() -> flask.Response:
    """Answer with the script that starts Swagger UI."""
    return _looser(Response(_SCRIPT.read_bytes()), "text/javascript; charset=utf-8")


@docs_blueprint.get("/swagger/<path:name>")
def get_file(name: str) -> flask.Response:
    """Answer with a file of Swagger UI, from the package that it ships in."""
    response = send_from_directory(str(_SWAGGER_UI), name)
    return _looser(response, response.content_type or "application/octet-stream")


def _looser(response: flask.Response, content_type: str) -> flask.Response:
    """Let the page use what it is made of; every other answer of the service may use nothing."""
    response.headers["Content-Type"] = content_type
    response.headers["Content-Security-Policy"] = _POLICY
    return response


def describe(app: Flask) -> dict[str, Any]:
    """Return the document of what `app` answers.

    Raises LookupError for a route that does not say what it answers.
    """
    routes = list(_routes(app))
    models = {model for _, view in routes for model in _models(view)}
    _, definitions = models_json_schema(
        [(model, "serialization") for model in sorted(models, key=lambda model: model.__name__)],
        ref_template="#/components/schemas/{model}",
    )
    components: dict[str, Any] = dict(sorted(definitions.get("$defs", {}).items()))
    paths: dict[str, Any] = {}
    methods = Counter(rule.endpoint for rule, _ in routes)
    for rule, view in routes:
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            name = view.__name__
            if methods[rule.endpoint] > 1:
                name += f"_{method.lower()}"
            operation = _operation(name, rule.endpoint.partition(".")[0], view, components)
            paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": TITLE, "version": VERSION, "description": _DESCRIPTION},
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": components,
            "headers": {
                "X-Request-ID": _header(
                    "what the request is called in the log: the X-Request-ID that came with it, if"
                    " it is sane, or a new one"
                )
            },
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "The `auth_token` of a login, a registration or a refresh.",
                }
            },
        },
    }


def _routes(app: Flask) -> Iterator[tuple[Rule, Any]]:
    for rule in app.url_map.iter_rules():
        if not rule.endpoint.startswith("docs."):
            view = app.view_functions[rule.endpoint]
            if not isinstance(getattr(view, "answers", None), Answers):
                raise LookupError(f"{rule.rule}: {view.__name__} names no answers (@answers.has)")
            yield rule, view


def _models(view: Any) -> set[type[BaseModel]]:
    body = _parameters(view).get("body")
    return {view.answers.model, *([body] if body else [])}


def _parameters(view: Any) -> dict[str, type[BaseModel]]:
    """Return the schemas of what a view takes: path, query, body."""
    return {name: one.annotation for name, one in inspect.signature(view).parameters.items()}


def _operation(name: str, blueprint: str, view: Any, components: dict[str, Any]) -> dict[str, Any]:
    summary, _, description = (inspect.getdoc(view) or "").partition("\n")
    takes = _parameters(view)
    guards = getattr(view, "guards", ())
    refusals = _refusals(view, guards, takes)
    operation: dict[str, Any] = {
        "operationId": name,
        "tags": [blueprint],
        "summary": summary,
        "description": description.strip(),
        "parameters": [
            *_fields(takes.get("path"), "path"),
            *_fields(takes.get("query"), "query"),
        ],
        "responses": {
            str(view.answers.status): _success(view, name),
            **_failures(refusals, blueprint, components, takes),
        },
    }
    for response in operation["responses"].values():
        response.setdefault("headers", {})["X-Request-ID"] = {"$ref": _REQUEST_ID_HEADER}
    if errors.TokenInvalid in refusals and errors.RefreshReused not in refusals:
        is_open = any(guard.__name__.endswith("_unless_open") for guard in guards)
        operation["security"] = [{"bearer": []}, *([{}] if is_open else [])]
    if body := takes.get("body"):
        content: dict[str, Any] = {"schema": _reference(body.__name__)}
        if example := _examples().get(name, {}).get("request"):
            content["example"] = example
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    return {key: value for key, value in operation.items() if value}


def _refusals(
    view: Any, guards: Iterable[Any], takes: dict[str, type[BaseModel]]
) -> set[type[errors.ServiceError]]:
    """Return everything that a route may refuse with, and every way in which it may fail."""
    refusals = {*view.answers.errors, errors.InternalError}
    for guard in guards:
        refusals |= set(guard.raises)
    if "body" in takes:
        refusals |= {errors.InvalidPayload, errors.PayloadTooLarge}
    if "query" in takes:
        refusals.add(errors.InvalidPayload)
    if view.answers.model is not answers.Probe:
        refusals |= {errors.DatabaseUnavailable, errors.HttpsRequired}
    return refusals


def _fields(model: type[BaseModel] | None, place: str) -> Iterator[dict[str, Any]]:
    """Yield the parameters that the fields of a schema are."""
    for name, schema in (model.model_json_schema() if model else {}).get("properties", {}).items():
        shown = {
            key: value
            for key, value in schema.items()
            if key != "title" and (key, value) != ("default", None)
        }
        yield {"name": name, "in": place, "required": place == "path", "schema": shown}


def _success(view: Any, operation_id: str) -> dict[str, Any]:
    model, status = view.answers.model, view.answers.status
    content: dict[str, Any] = {"schema": _reference(model.__name__)}
    if example := _examples().get(operation_id, {}).get("answer"):
        content["example"] = example
    response: dict[str, Any] = {
        "description": inspect.getdoc(model) or HTTPStatus(status).phrase,
        "content": {"application/json": content},
    }
    if "limit" in (_parameters(view).get("query") or BaseModel).model_fields:
        response["headers"] = {"Link": _header("the next page, if there is one (RFC 8288)")}
    return response


def _failures(
    refusals: Iterable[type[errors.ServiceError]],
    blueprint: str,
    components: dict[str, Any],
    takes: dict[str, type[BaseModel]],
) -> dict[str, Any]:
    """Return the responses that refusals are, by status; their schemas go to `components`."""
    by_status: dict[str, list[type[errors.ServiceError]]] = {}
    for refusal in sorted(refusals, key=lambda refusal: (refusal.status, refusal.code)):
        by_status.setdefault(str(refusal.status), []).append(refusal)
    responses: dict[str, Any] = {}
    for status, alternatives in by_status.items():
        schemas_, examples, lines = [], {}, []
        for refusal in alternatives:
            word = error_handlers.word(refusal, blueprint)
            name = refusal.__name__ + ("InView" if word == "fail" else "")
            components.setdefault(name, _failure_schema(refusal, word))
            schemas_.append(_reference(name))
            lines.append(f"`{refusal.code}`: {refusal.message}")
            details = {"email": "is taken"} if refusal in _WITH_ERRORS else None
            if refusal is errors.InvalidPayload:
                details = _mistakes(takes)
            envelope = failure(refusal(errors=details), word, _REQUEST_ID).get_data()
            examples[name] = {"value": orjson.loads(envelope)}
        responses[status] = {
            "description": "\n\n".join(dict.fromkeys(lines)),
            "content": {
                "application/json": {
                    "schema": schemas_[0] if len(schemas_) == 1 else {"anyOf": schemas_},
                    "examples": examples,
                }
            },
        }
        if status == "401":
            responses[status]["headers"] = {"WWW-Authenticate": _header("RFC 6750, 3")}
        elif status in {"429", "503"}:
            responses[status]["headers"] = {"Retry-After": _header("seconds", "integer")}
    return responses


def _mistakes(takes: dict[str, type[BaseModel]]) -> dict[str, str]:
    """Return what a request is told that has nothing in its body, or nonsense in its query."""
    # Whoever would delete their own account where that takes no password is asked for one.
    model, wrong = takes.get("body", schemas.AccountDeletion), {}
    if "query" in takes:
        model, wrong = takes["query"], dict.fromkeys(takes["query"].model_fields, "-")
    try:
        model.model_validate(wrong)
    except ValidationError as error:
        return schemas.refuse(error).errors or {}
    raise LookupError(f"{model} takes {wrong}")


def _failure_schema(refusal: type[errors.ServiceError], word: str) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "status": {"const": word},
        "message": {"const": refusal.message},
        "code": {"const": refusal.code},
    }
    required = list(properties)
    if refusal in _WITH_ERRORS:
        properties["errors"] = {"type": "object", "additionalProperties": {"type": "string"}}
        required.append("errors")
    if refusal.status >= 500:
        properties["request_id"] = {"type": "string", "description": "as in X-Request-ID"}
        required.append("request_id")
    return {
        "type": "object",
        "description": inspect.getdoc(refusal),
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _header(description: str, type_: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": type_}}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


@cache
def _examples() -> dict[str, Any]:
    """Return requests and answers as they once went over the wire, by operation."""
    examples: dict[str, Any] = orjson.loads(_EXAMPLES.read_bytes())
    return examples
