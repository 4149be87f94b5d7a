"""Show that a new signing key is noticed by nobody: python -m bench.rotation --help.

Two servers run behind nginx on one PostgreSQL. Users log in and refresh without pause, and other
services, which are PyJWT's PyJWKClient or `examples/resource_server.py`, verify each new token at
once and earlier ones again, while the signing key is replaced three times. A token that is refused
before it expires is a failure.
"""

import argparse
import contextlib
import importlib.util
import os
import random
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
from sqlalchemy import URL, Engine, create_engine, make_url, text

from bench.load import running
from bench.proxies import free_ports, proxy
from bench.report import add_database_url, exit_on_sigterm, machine, say
from bench.rolling import Client, Server
from bench.servers import PASSWORD, ROOT, database, new_user, url_text
from project.tokens.signing_keys import MIN_AGE, PUBLISHED_BEFORE

EXAMPLE = ROOT / "examples" / "resource_server.py"
OF_EACH_KIND = 2  # services
ROTATIONS = 3
LIFETIME = 900  # seconds, of an auth token
REFRESHES = 10  # after each login
HELD = 10  # earlier tokens that are verified beside each new one, and one of them by our servers
PAUSE = 0.3  # seconds
WARM = 3  # seconds
MARGIN = 5  # seconds before its end in which a token is not verified
CLAIMS = ["iss", "aud", "exp", "iat", "sub", "jti", "client_id"]
BRING_FORWARD = text(
    "UPDATE signing_keys SET signs_from = signs_from - make_interval(secs => :seconds)"
    " WHERE verifies_until IS NULL"
)


Verify = Callable[[str], object]  # raises an exception for a token that it refuses


def stock(issuer: str, keep: float) -> Verify:
    """Return a service that uses PyJWKClient as PyJWT's documentation does."""
    keys = jwt.PyJWKClient(f"{issuer}/.well-known/jwks.json", lifespan=keep)

    def verify(token: str) -> None:
        key = keys.get_signing_key_from_jwt(token)
        jwt.decode(token, key, ["ES256"], {"require": CLAIMS}, audience=issuer, issuer=issuer)

    return verify


def example(issuer: str, keep: float) -> Verify:
    """Return the example, in this process."""
    spec = importlib.util.spec_from_file_location("resource_server", EXAMPLE)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{EXAMPLE} cannot be imported")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.KEYS_FRESH = min(keep, module.KEYS_FRESH)
    os.environ["ISSUER"] = issuer
    client = module.create_app().test_client()

    def verify(token: str) -> None:
        answer = client.get("/whoami", headers={"Authorization": f"Bearer {token}"})
        if answer.status_code != 200:
            raise jwt.InvalidTokenError(f"{answer.status}, {answer.headers}")

    return verify


class Service(Client):
    """Another service, with its own copy of the public keys, and a user who gets the tokens."""

    def __init__(
        self, port: int, over: threading.Event, verify: Verify, held: list[tuple[float, str]]
    ) -> None:
        super().__init__(port, over)
        self._verify_token = verify
        self._held = held  # when the tokens of all services expire, and the tokens
        self._user = new_user()
        self._registered = False
        self.signed: Counter[str] = Counter()  # by `kid`
        self.verified: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def _visit(self) -> None:
        if not self._registered:
            self._send("POST", "/auth/register", self._user)
            self._registered = True
        credentials = {"email": self._user["email"], "password": PASSWORD}
        pair = self._send("POST", "/auth/login", credentials)
        for _ in range(REFRESHES):
            token = pair["auth_token"]
            self.signed[self._verify(token)] += 1
            self._send("GET", "/auth/status", token=token)
            self._held.append((time.time() + pair["expires_in"], token))
            held = random.choices(self._held, k=HELD)  # noqa: S311  # no secret
            for expires_at, token in held:
                if expires_at - time.time() > MARGIN:
                    self._verify(token)
            if expires_at - time.time() > MARGIN:
                self._send("GET", "/auth/status", token=token)
            if self._over.wait(PAUSE):
                return
            pair = self._send("POST", "/auth/refresh", {"refresh_token": pair["refresh_token"]})

    def _verify(self, token: str) -> str:
        """Verify a token, and return the `kid` of its key."""
        kid = str(jwt.get_unverified_header(token)["kid"])
        try:
            self._verify_token(token)
        except jwt.PyJWTError as error:
            self.refused[kid] += 1
            self.losses.append(f"{type(error).__name__}: {error}")
        self.verified[kid] += 1
        return kid


def rotate(engine: Engine, environment: dict[str, str], ahead: float) -> None:
    """Publish a new key that signs `ahead` seconds later."""
    command = [sys.executable, "manage.py", "rotate_keys"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    with engine.begin() as connection:
        connection.execute(BRING_FORWARD, {"seconds": PUBLISHED_BEFORE - ahead})
    say("a new key is published")


def run(engine: Engine, environment: dict[str, str], port: int, ahead: float) -> list[Service]:
    """Run the services while the key is rotated; return them with what they counted."""
    over, held = threading.Event(), list[tuple[float, str]]()
    keep = ahead / 3
    issuer = environment["ISSUER"]
    services = [
        Service(port, over, verifier(issuer, keep), held)
        for verifier in (stock, example)
        for _ in range(OF_EACH_KIND)
    ]
    with running(services, over):
        time.sleep(WARM)  # they fetch the keys just before another one is published
        begun = time.monotonic()
        for number in range(ROTATIONS):
            time.sleep(max(0, begun + number * keep - time.monotonic()))
            rotate(engine, environment, ahead)
        # Without compression, the first key is no longer published at the end.
        end = time.monotonic() + 1.45 * ahead
        while time.monotonic() < end:
            time.sleep(min(10, ahead / 10))
            say(f"{sum(sum(service.verified.values()) for service in services):,} verifications")
    return services


def report(server_url: URL, ahead: float, wanted: int) -> tuple[str, bool]:
    """Return the table in Markdown, and whether it shows that nobody noticed."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = free_ports(2)
        port = stack.enter_context(proxy("nginx", folder, ports))
        url = stack.enter_context(database(server_url))
        settings = {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "DATABASE_URL": url_text(url),
            "SECRET_KEY": secrets.token_hex(32),
            "ENCRYPTION_KEYS": secrets.token_hex(32),
            "ISSUER": f"https://127.0.0.1:{port}",
            "TOKEN_EXPIRATION_DAYS": "0",
            "TOKEN_EXPIRATION_SECONDS": str(LIFETIME),
            "BCRYPT_LOG_ROUNDS": "4",
            "TRUSTED_PROXIES": "1",
            "GRANIAN_HOST": "127.0.0.1",
            "GRANIAN_WORKERS": "2",
        }
        for each in ports:
            server = Server(each, dict(settings), folder / f"{each}.log")
            stack.callback(server.stop)
            server.start()
        engine = create_engine(url)
        stack.callback(engine.dispose)
        services = run(engine, os.environ | settings, port, ahead)
        with engine.connect() as connection:
            kids = connection.scalars(
                text("SELECT kid FROM signing_keys ORDER BY signs_from")
            ).all()
    signed, verified, refused, answers = (
        sum((getattr(service, name) for service in services), Counter[str]())
        for name in ("signed", "verified", "refused", "answers")
    )
    losses = [loss for service in services for loss in service.losses]
    for loss, count in Counter(losses).most_common(10):
        say(f"{count} times {loss}")
    failed = len(losses) - refused.total()
    lines = [
        f"{machine(server_url)}. {circumstances(ahead)}",
        "",
        "| key | tokens signed | verifications | refused |",
        "|---|---|---|---|",
        *(
            f"| {number} | {signed[kid]:,} | {verified[kid]:,} | {refused[kid]:,} |"
            for number, kid in enumerate(kids, 1)
        ),
        f"| all | {signed.total():,} | {verified.total():,} | {refused.total():,} |",
        "",
        f"Our servers: {answers.total():,} responses, {failed:,} not successful.",
        "",
    ]
    # With a key that signed nothing, or too few verifications, the trial would show nothing.
    enough = (
        verified.total() >= wanted and len(kids) == ROTATIONS + 1 and all(map(signed.get, kids))
    )
    return "\n".join(lines), enough and not refused.total() and not answers["401"]


def circumstances(ahead: float) -> str:
    """Say which services verify, and what was compressed."""
    services = f"{OF_EACH_KIND} services with PyJWKClient, {OF_EACH_KIND} like the example."
    if ahead == PUBLISHED_BEFORE:
        return f"{services} Nothing is compressed: keys sign {ahead:g} s after they are published."
    return (
        f"{services} Compressed: keys sign {ahead:g} s after they are published, not"
        f" {PUBLISHED_BEFORE} s, and the services fetch them every {ahead / 3:g} s, not every 300"
        " and 60 s."
    )


def seconds_ahead(argument: str) -> float:
    """Return a time that is enough: the public keys are old for MIN_AGE, and then kept."""
    ahead = float(argument)
    if not 2 * MIN_AGE <= ahead <= PUBLISHED_BEFORE:
        raise argparse.ArgumentTypeError(f"not between {2 * MIN_AGE} and {PUBLISHED_BEFORE}")
    return ahead


def main() -> int:
    """Print the table; return 1 if a token was refused, or if the trial shows nothing."""
    parser = argparse.ArgumentParser(prog="python -m bench.rotation", description=__doc__)
    add_database_url(parser)
    parser.add_argument(
        "--ahead",
        type=seconds_ahead,
        default=PUBLISHED_BEFORE,
        help="seconds between the publication and the first signature of a key; the benchmark"
        " takes twice as long",
    )
    parser.add_argument(
        "--verifications", type=int, default=50_000, help="how many there have to be at least"
    )
    options = parser.parse_args()
    exit_on_sigterm()
    table, good = report(make_url(options.database_url), options.ahead, options.verifications)
    print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
