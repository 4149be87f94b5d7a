"""/docs: the API document and Swagger UI, only where API_DOCS is set."""

from importlib import resources
from pathlib import Path

import flask
import orjson
from flask import Blueprint, send_from_directory
from flask_openapi3 import OpenAPI

from project.api import openapi
from project.api.responses import Response
from project.lib.app_state import AppState

_PAGE = Path(__file__).with_name("docs.html")
_SCRIPT = Path(__file__).with_name("docs.js")
_SWAGGER_UI = resources.files("flask_openapi3_swagger") / "templates" / "swagger"
# Swagger UI sets styles on its elements; everything else comes from files of the service.
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_document = AppState[bytes]("api_document")

docs_blueprint = Blueprint("docs", __name__, url_prefix="/docs")


def init_app(app: OpenAPI) -> None:
    """Serve the document and the page if API_DOCS is set."""
    if app.config["API_DOCS"]:
        _document.set(app, orjson.dumps(openapi.describe(app)))
        app.register_blueprint(docs_blueprint)


@docs_blueprint.get("/openapi.json")
def get_document() -> flask.Response:
    """Return the API document."""
    return Response(_document.get())


@docs_blueprint.get("")
def get_page() -> flask.Response:
    """Return the page."""
    return _page_file(Response(_PAGE.read_bytes()), "text/html; charset=utf-8")


@docs_blueprint.get("/docs.js")
def get_script() -> flask.Response:
    """Return the script that starts Swagger UI."""
    return _page_file(Response(_SCRIPT.read_bytes()), "text/javascript; charset=utf-8")


@docs_blueprint.get("/swagger/<path:name>")
def get_file(name: str) -> flask.Response:
    """Return a file of Swagger UI, from the package that ships it."""
    response = send_from_directory(str(_SWAGGER_UI), name)
    return _page_file(response, response.content_type or "application/octet-stream")


def _page_file(response: flask.Response, content_type: str) -> flask.Response:
    """Allow the page to load its own files; other responses allow nothing."""
    response.headers["Content-Type"] = content_type
    response.headers["Content-Security-Policy"] = _CONTENT_SECURITY_POLICY
    return response
