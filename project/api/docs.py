"""/: what this service is. /docs: the API document and Swagger UI, only where API_DOCS is set."""

from importlib import resources
from pathlib import Path

import flask
import orjson
from flask import Blueprint, current_app, request, send_from_directory
from flask_openapi3 import OpenAPI

from project.api import openapi, responses, schemas
from project.api.responses import Response, success
from project.lib.app_state import AppState

_PAGE = Path(__file__).with_name("docs.html")
_SCRIPT = Path(__file__).with_name("docs.js")
_SWAGGER_UI = resources.files("flask_openapi3_swagger") / "templates" / "swagger"
# Swagger UI sets styles on its elements; everything else comes from files of the service.
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_KINDS = ["application/json", "text/html"]  # of the response to a client that accepts either

_document = AppState[bytes]("api_document")

service_blueprint = openapi.Blueprint("service", "What this service is.")
docs_blueprint = Blueprint("docs", __name__, url_prefix="/docs")


def init_app(app: OpenAPI) -> None:
    """Serve what the service is, and the document and the page if API_DOCS is set."""
    app.register_api(service_blueprint)
    if app.config["API_DOCS"]:
        _document.set(app, orjson.dumps(openapi.describe(app)))
        app.register_blueprint(docs_blueprint)


@service_blueprint.get("/")
@responses.returns(200, schemas.Service)
def get_service() -> flask.Response:
    """Say what this service is, and where the page with its API document is.

    A browser, which prefers `text/html`, is sent to that page, if there is one.
    """
    documented = current_app.config["API_DOCS"]
    if documented and request.accept_mimetypes.best_match(_KINDS) == "text/html":
        return Response(status=303, headers={"Location": "docs"})
    documentation = "/docs" if documented else None
    return success(name=openapi.INFO.title, documentation=documentation)


@docs_blueprint.get("/")
def redirect_to_page() -> flask.Response:
    """Send a browser to the page, whose links are relative to its path without a slash."""
    return Response(status=308, headers={"Location": "../docs"})


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
