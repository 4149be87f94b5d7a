"""/health: liveness and readiness, for load balancers and orchestrators."""

from flask import Response, current_app

from project import errors
from project.api import responses, schemas
from project.api.openapi import Blueprint
from project.api.responses import success
from project.config import VERSION
from project.lib import readiness

health_blueprint = Blueprint("health", "Liveness and readiness.", url_prefix="/health")


@health_blueprint.get("/live")
@responses.returns(200, schemas.Liveness)
def get_liveness() -> Response:
    """Check that the process responds; a process that does not should be restarted.

    No other component is checked.
    """
    if current_app.config["SHOW_VERSION"]:
        return success(message="alive", version=VERSION)
    return success(message="alive")


@health_blueprint.get("/ready")
@responses.returns(
    200, schemas.Probe, errors.DatabaseUnavailable, errors.DatabaseNotMigrated, errors.Draining
)
def get_readiness() -> Response:
    """Check that the database is available and migrated, and that no stop is announced.

    A process that is not ready should receive no requests.
    """
    readiness.check()
    return success(message="ready")
