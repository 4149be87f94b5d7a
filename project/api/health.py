"""/health: is this process alive, and may requests be sent to it? For balancers and the like."""

from flask import Response
from flask_openapi3 import APIBlueprint

from project import readiness
from project.api import answers
from project.api.responses import success
from project.errors import DatabaseNotMigrated, DatabaseUnavailable

health_blueprint = APIBlueprint("health", __name__, url_prefix="/health")


@health_blueprint.get("/live")
@answers.has(200, answers.Probe)
def get_liveness() -> Response:
    """Say that the process answers; of a process that does not, a new one is started."""
    return success(message="alive")


@health_blueprint.get("/ready")
@answers.has(200, answers.Probe, DatabaseUnavailable, DatabaseNotMigrated)
def get_readiness() -> Response:
    """Say that the database answers, and has the tables; until then, requests go elsewhere."""
    readiness.check()
    return success(message="ready")
