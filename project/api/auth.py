"""/auth: register, log in, log out, and who am I."""

from flask import Response, g
from flask_openapi3 import APIBlueprint

from project import accounts
from project.api import guards, requests
from project.api.models import encode_auth_token
from project.api.responses import success
from project.api.schemas import Credentials, NewUser
from project.extensions import db

auth_blueprint = APIBlueprint("auth", __name__, url_prefix="/auth")


@auth_blueprint.post("/register")
@guards.required(requests.take_turn)
def register_user(body: NewUser) -> Response:
    """Register a user, and log them in."""
    user = accounts.register(body.username, body.email, body.password)
    db.session.commit()
    return success(201, message="Successfully registered.", auth_token=encode_auth_token(user.id))


@auth_blueprint.post("/login")
@guards.required(requests.take_turn)
def login_user(body: Credentials) -> Response:
    """Exchange an email and a password for a token."""
    user_id = accounts.authenticate(body.email, body.password)
    db.session.commit()
    return success(message="Successfully logged in.", auth_token=encode_auth_token(user_id))


@auth_blueprint.get("/logout")
@auth_blueprint.post("/logout")
@guards.required(guards.authenticate_to_log_out)
def logout_user() -> Response:
    """Log out."""
    return success(message="Successfully logged out.")


@auth_blueprint.get("/status")
@guards.required(guards.authenticate)
def get_user_status() -> Response:
    """Say who is calling."""
    user = g.user
    return success(
        data={
            "id": user.id,
            "username": user.username,
            "email": user.email,
            "active": user.active,
            "created_at": user.created_at,
        }
    )
