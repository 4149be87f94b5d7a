"""A Flask service whose callers have tokens of the users service, to copy.

    ISSUER=https://users.example flask --app examples/resource_server.py run

It needs Python 3.11, Flask and PyJWT[crypto]. Its settings are environment variables: ISSUER, the
URL of the users service; AUDIENCE, the `aud` of its tokens, by default the ISSUER; and, to learn
within seconds that a session has ended, CLIENT_ID and CLIENT_SECRET.
"""

import json
import os
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from logging import getLogger
from threading import Lock, Thread
from time import monotonic, sleep
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import jwt
from flask import Flask, Response, abort, current_app, g, request

# Seconds: for which the issuer may send nothing; by which the clocks may differ; between two
# fetches for unknown keys; until keys are fetched again; and until they are not used any more.
TIMEOUT, LEEWAY, COOLDOWN, KEYS_FRESH, KEYS_LIFETIME = 2, 5, 5, 60, 300
OPTIONS: Any = {"require": ["iss", "aud", "exp", "iat", "sub", "jti", "client_id"]}
FORBIDDEN = {"jku", "jwk", "x5c", "x5u", "crit"}  # headers that bring a key or a rule along


class Keys(jwt.PyJWKClient):
    """A PyJWKClient in which no request waits for the fetch of another one, except for the first.

    The original fetches under a lock, and has no cool-down after a fetch that failed.
    """

    tried_at, no_keys = float("-inf"), Lock()

    def get_signing_key(self, kid: str) -> jwt.PyJWK:
        """Return a key; raise InvalidKeyError, or PyJWKClientConnectionError if none is known."""
        with nullcontext() if self.known() else self.no_keys:
            known = self.known()
            key = self.match_kid(known.keys, kid) if known else None
            if monotonic() - self.tried_at >= (KEYS_FRESH if key else COOLDOWN):
                self.tried_at = monotonic()
                with suppress(jwt.PyJWTError, OSError, ValueError):  # the known keys go on
                    known = self.get_jwk_set(refresh=True)
                    key = self.match_kid(known.keys, kid)
            if not key:
                raise jwt.InvalidKeyError if known else jwt.PyJWKClientConnectionError
            return key

    def known(self) -> Any:
        """Return the keys that were fetched in the last KEYS_LIFETIME seconds."""
        return self.jwk_set_cache and self.jwk_set_cache.get()


def verify(token: str) -> dict[str, Any]:
    """Return the claims of a valid token; raise a PyJWTError."""
    config, header = current_app.config, jwt.get_unverified_header(token)
    kind = str(header.get("typ")).lower().removeprefix("application/")
    if kind != "at+jwt" or FORBIDDEN & header.keys():
        raise jwt.InvalidTokenError
    key = config["KEYS"].get_signing_key(header.get("kid", ""))
    claims = jwt.decode(token, key, ["ES256"], OPTIONS, leeway=LEEWAY, **config["EXPECTED"])
    if config["FEED"] and config["FEED"].has_ended(claims.get("sid")):
        raise jwt.InvalidTokenError
    return claims


@contextmanager
def require(*scopes: str) -> Iterator[None]:
    """Decorate a view whose callers need a token with all these scopes."""
    given = request.authorization
    if not given or given.type != "bearer":
        refuse(401)
    try:
        g.claims = verify(given.token or "")
    except jwt.PyJWKClientConnectionError:
        abort(Response(status=503, headers={"Retry-After": str(COOLDOWN)}))
    except jwt.PyJWTError:
        refuse(401, ', error="invalid_token"')
    if not {*scopes} <= {*g.claims.get("scope", "").split()}:
        refuse(403, f', error="insufficient_scope", scope="{" ".join(scopes)}"')
    yield


def refuse(status: int, problem: str = "") -> NoReturn:
    """Answer as RFC 6750, 3 says: to a request without a token, without a problem."""
    abort(Response(status=status, headers={"WWW-Authenticate": f'Bearer realm="example"{problem}'}))


def create_app() -> Flask:
    """Return the service."""
    app, issuer, client = Flask(__name__), os.environ["ISSUER"], os.environ.get("CLIENT_ID")
    jwks = f"{issuer}/.well-known/jwks.json"
    app.config["KEYS"] = Keys(jwks, lifespan=KEYS_LIFETIME, timeout=TIMEOUT)
    app.config["EXPECTED"] = {"issuer": issuer, "audience": os.environ.get("AUDIENCE", issuer)}
    app.config["FEED"] = Feed(f"{issuer}/oauth/revocations", client) if client else None

    @app.get("/whoami")
    @require()
    def whoami() -> Any:
        return {name: g.claims.get(name) for name in ("sub", "client_id", "scope")}

    @app.get("/reports")
    @require("reports")
    def reports() -> Any:
        return {"reports": []}

    return app


# Only to learn that a session has ended before its tokens expire.

POLL_INTERVAL, FEED_LIFETIME = 5, 60  # seconds; an older feed is out of date


class Feed:
    """The sessions that have ended while their tokens look good, as a thread reads them."""

    def __init__(self, url: str, client: str) -> None:
        basic = b64encode(f"{client}:{os.environ['CLIENT_SECRET']}".encode()).decode()
        self.url, self.headers = url, {"Authorization": f"Basic {basic}"}
        self.after, self.read_at = "", float("-inf")
        self.ended: dict[str, datetime] = {}  # by `sid`: when its last token expires
        Thread(target=self.follow, daemon=True).start()

    def follow(self) -> None:
        """Read the feed for ever. If the cursor is refused, start again from the beginning."""
        while True:
            try:
                self.read()
            except Exception as error:  # noqa: BLE001  # the thread has to go on
                getLogger(__name__).warning("The feed cannot be read: %r", error)
                if isinstance(error, HTTPError) and error.code == 400:
                    self.after = ""
            sleep(POLL_INTERVAL)

    def read(self) -> None:
        """Read what is new, up to the end, and forget sessions whose tokens have expired."""
        began, more = monotonic(), True
        while more:
            page = Request(self.url + self.after, headers=self.headers)
            with urlopen(page, timeout=TIMEOUT) as answer:
                data = json.load(answer)["data"]
            for row in data["revocations"]:
                self.ended[row["sid"]] = datetime.fromisoformat(row["expires_at"])
            self.after, more = f"?after={data['next']}", bool(data["revocations"])
        over = datetime.now(UTC) - timedelta(seconds=2 * LEEWAY)
        self.ended = {sid: end for sid, end in self.ended.items() if end > over}
        self.read_at = began

    def has_ended(self, sid: str | None) -> bool:
        """Tell whether a session has ended; raise PyJWKClientConnectionError if that is unknown."""
        if monotonic() - self.read_at > FEED_LIFETIME:
            raise jwt.PyJWKClientConnectionError
        return sid in self.ended
