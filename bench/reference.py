"""The reference that the service is compared with: plain Flask and Flask-SQLAlchemy in one file.

gunicorn serves it as `bench.reference:app`; `python -m bench.reference` creates the tables.
"""

import datetime
import os
from typing import Any

import jwt
from flask import Flask, Response, jsonify, request
from flask_bcrypt import Bcrypt
from flask_sqlalchemy import SQLAlchemy

app = Flask(__name__)
app.config["SECRET_KEY"] = os.environ["SECRET_KEY"]
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
app.config["BCRYPT_LOG_ROUNDS"] = int(os.environ.get("BCRYPT_LOG_ROUNDS", "12"))

db = SQLAlchemy(app)
bcrypt = Bcrypt(app)

Answer = Response | tuple[Response, int]


class User(db.Model):  # type: ignore[name-defined,misc]
    """A user who can log in."""

    __tablename__ = "users"

    id = db.Column(db.Integer, primary_key=True)
    username = db.Column(db.String(128), unique=True, nullable=False)
    email = db.Column(db.String(128), unique=True, nullable=False)
    password = db.Column(db.String(255), nullable=False)
    active = db.Column(db.Boolean, default=True, nullable=False)
    created_at = db.Column(
        db.DateTime(timezone=True),
        default=lambda: datetime.datetime.now(datetime.UTC),
        nullable=False,
    )

    def to_json(self) -> dict[str, Any]:
        """Return the public fields of the user."""
        return {
            "id": self.id,
            "username": self.username,
            "email": self.email,
            "created_at": self.created_at.isoformat(),
        }

    def encode_auth_token(self) -> str:
        """Return a token for this user that is valid for 30 days."""
        now = datetime.datetime.now(datetime.UTC)
        payload = {"sub": str(self.id), "iat": now, "exp": now + datetime.timedelta(days=30)}
        return jwt.encode(payload, app.config["SECRET_KEY"], algorithm="HS256")


def error(message: str, status: int) -> Answer:
    """Return the response to a refused request."""
    return jsonify(status="error", message=message), status


@app.get("/ping")
def ping() -> Answer:
    """Confirm that the process answers."""
    return jsonify(status="success", message="pong!")


@app.post("/auth/register")
def register() -> Answer:
    """Add a user and return a token."""
    data = request.get_json()
    username, email, password = data.get("username"), data.get("email"), data.get("password")
    if not username or not email or not password:
        return error("Invalid payload.", 400)
    if User.query.filter(db.or_(User.username == username, User.email == email)).first():
        return error("Sorry. That user already exists.", 400)
    hashed = bcrypt.generate_password_hash(password).decode()
    user = User(username=username, email=email, password=hashed)
    db.session.add(user)
    db.session.commit()
    token = user.encode_auth_token()
    return jsonify(status="success", message="Successfully registered.", auth_token=token), 201


@app.post("/auth/login")
def login() -> Answer:
    """Exchange an email and a password for a token."""
    data = request.get_json()
    user = User.query.filter_by(email=data.get("email")).first()
    if user is None or not bcrypt.check_password_hash(user.password, data.get("password")):
        return error("User does not exist.", 404)
    token = user.encode_auth_token()
    return jsonify(status="success", message="Successfully logged in.", auth_token=token)


@app.get("/auth/status")
def status() -> Answer:
    """Return the user of the token."""
    header = request.headers.get("Authorization", "")
    if not header.startswith("Bearer "):
        return error("Provide a valid auth token.", 401)
    try:
        payload = jwt.decode(
            header.removeprefix("Bearer "), app.config["SECRET_KEY"], algorithms=["HS256"]
        )
    except jwt.ExpiredSignatureError:
        return error("Signature expired. Please log in again.", 401)
    except jwt.InvalidTokenError:
        return error("Invalid token. Please log in again.", 401)
    user = User.query.filter_by(id=int(payload["sub"])).first()
    if user is None or not user.active:
        return error("Something went wrong. Please contact us.", 401)
    return jsonify(status="success", data={**user.to_json(), "active": user.active})


@app.get("/users")
def users() -> Answer:
    """List the newest users."""
    newest = User.query.order_by(User.created_at.desc()).limit(50).all()
    return jsonify(status="success", data={"users": [user.to_json() for user in newest]})


if __name__ == "__main__":
    with app.app_context():
        db.create_all()
