"""The request ID of every response, and the line that every request leaves in the access log."""

import io
import json
from typing import Any
from unittest import mock
from urllib.parse import quote

import structlog
from sqlalchemy import text

from project import errors
from project.lib import logs
from project.tests.base import BaseTestCase, bearer
from project.tests.lib.log_capture import captured_log
from project.tests.rows import add_user, stored_events, stored_users

VALID = ("req-1", "0af7651916cd43dd8448eb211c80319c", "a.b_c=d+e/f:g-h", "x" * 64)
INVALID = ("", " ", "a b", "x" * 65, "ä", '"', "a,b", "{}", "<b>", "a;b", "%0a")
GENERATED = r"\A[0-9a-f]{32}\Z"


class TestRequestId(BaseTestCase):
    """X-Request-ID: taken from the client or the proxy, or made by the service."""

    def test_given_back(self) -> None:
        """A valid ID is returned as it was sent, whatever the status."""
        for name in VALID:
            for path in ("/ping", "/nothing", "/auth/status", "/docs", "/docs/openapi.json"):
                with self.subTest(name, path=path):
                    response = self.client.get(path, headers={"X-Request-ID": name})

                    self.assertEqual([name], response.headers.getlist("X-Request-ID"))

    def test_made(self) -> None:
        """Without a valid ID every response has a new one."""
        made = set()
        for name in INVALID:
            with self.subTest(name):
                response = self.client.get("/ping", headers={"X-Request-ID": name})

                self.assertRegex(response.headers["X-Request-ID"], GENERATED)
                made.add(response.headers["X-Request-ID"])
        for method in ("HEAD", "OPTIONS", "PUT", "PROPFIND"):
            response = self.client.open("/users", method=method)
            made.add(response.headers["X-Request-ID"])

        self.assertEqual(len(INVALID) + 4, len(made))

    def test_failures(self) -> None:
        """The body of every 5xx has the ID too, and no other body has."""
        with mock.patch("project.accounts.directory.find", side_effect=RuntimeError):
            fault = self.get("/users/1")
        pool = self.app.extensions["hashing_pool"]
        places = self.app.config["GRANIAN_BLOCKING_THREADS"]
        with self.app.app_context():
            for _ in range(places):
                pool.enter()
            busy = self.login()
        missing = self.get("/nothing")

        self.assertEqual([500, 503, 404], [each.status_code for each in (fault, busy, missing)])
        for failure in (fault, busy):
            self.assertEqual(failure.headers["X-Request-ID"], failure.get_json()["request_id"])
        self.assertNotIn("request_id", missing.get_json())

    def test_error_outside_of_any_view(self) -> None:
        """An error after the view leaves a response and log lines with the ID."""

        def fail(_: object) -> None:
            raise RuntimeError

        self.app.after_request(fail)
        self.app.config["PROPAGATE_EXCEPTIONS"] = False
        with captured_log(readable=False) as lines:
            response = self.client.get("/ping", headers={"X-Request-ID": "req-1"})

        self.assertEqual(500, response.status_code)
        self.assertEqual("req-1", response.headers["X-Request-ID"])
        logged = [json.loads(line) for line in lines.getvalue().splitlines()]
        events = ["unhandled_exception", "unhandled_exception", "request"]
        self.assertEqual(events, [line["event"] for line in logged])
        self.assertEqual({"req-1"}, {line["request_id"] for line in logged})


class TestTrace(BaseTestCase):
    """The header traceparent (W3C Trace Context)."""

    TRACE = "0af7651916cd43dd8448eb211c80319c"

    def traces(self, traceparent: str) -> set[str | None]:
        """Return the trace ID of each line that a failing request leaves."""
        headers = {"traceparent": traceparent}
        with (
            captured_log(readable=False) as lines,
            mock.patch("project.accounts.directory.find", side_effect=RuntimeError),
        ):
            self.client.get("/users/1", headers=headers)
        logged = [json.loads(line) for line in lines.getvalue().splitlines()]
        self.assertEqual(2, len(logged))
        return {line.get("trace_id") for line in logged}

    def test_valid(self) -> None:
        """Every line of a request has the trace ID; a later version may have further fields."""
        for version, more in (("00", ""), ("cc", ""), ("01", "-more"), ("01", "-")):
            with self.subTest(version, more=more):
                header = f"{version}-{self.TRACE}-b7ad6b7169203331-01{more}"

                self.assertEqual({self.TRACE}, self.traces(header))

    def test_invalid(self) -> None:
        """A header that is not valid is ignored."""
        good = f"00-{self.TRACE}-b7ad6b7169203331-01"
        for bad in (
            "",
            self.TRACE,
            good.upper(),
            f"ff{good[2:]}",
            f"0{good[2:]}",
            good.replace(self.TRACE, "0" * 32),
            good.replace("b7ad6b7169203331", "0" * 16),
            good.replace("0af7", "0afg"),
            good[:-1],
            f"{good}-more",
            f"{good}-",
            f"01{good[2:]}more",
            f"{good},{good}",
        ):
            with self.subTest(bad):
                self.assertEqual({None}, self.traces(bad))


class TestLine(BaseTestCase):
    """The line that a request leaves in the access log."""

    def lines(self, path: str, method: str = "GET", **more: Any) -> list[dict[str, Any]]:
        """Send a request, and return the lines of production's log."""
        with captured_log(readable=False) as lines:
            self.client.open(path, method=method, **more)
        return [json.loads(line) for line in lines.getvalue().splitlines()]

    def line(self, path: str, method: str = "GET", **more: Any) -> dict[str, Any]:
        """Send a request that leaves one line, and return it."""
        (line,) = self.lines(path, method, **more)
        self.assertEqual(("request", "info"), (line.pop("event"), line.pop("level")))
        self.assertRegex(line.pop("timestamp"), r"\A[0-9T:.-]+Z\Z")
        self.assertGreaterEqual(line.pop("ms"), 0)
        return line

    def test_good(self) -> None:
        """A line has the method, path, route, status, address, user and request ID."""
        token = self.register()
        user = add_user("other", "other@test.com", "test")
        headers = bearer(token) | {"X-Request-ID": "req-1"}

        self.assertEqual(
            {
                "method": "GET",
                "path": "/auth/status",
                "route": "/auth/status",
                "status": 200,
                "ip": "127.0.0.1",
                "user_id": user.id - 1,
                "request_id": "req-1",
            },
            self.line("/auth/status?token=secret", headers=headers),
        )

    def test_refused(self) -> None:
        """A refusal has its code; an unknown path has no route."""
        for path, method, route, status, code in (
            ("/users/x", "GET", "/users/<user_id>", 404, "user_not_found"),
            ("/nothing", "GET", None, 404, "not_found"),
            ("/ping", "POST", None, 405, "method_not_allowed"),
            ("/auth/login", "POST", "/auth/login", 400, "invalid_payload"),
        ):
            with self.subTest(path, method=method):
                line = self.line(path, method)

                found = [line.get(name) for name in ("path", "route", "status", "code")]
                self.assertEqual([path, route, status, code], found)
                self.assertRegex(line["request_id"], GENERATED)
                self.assertNotIn("user_id", line)

    def test_probes(self) -> None:
        """With LOG_PROBES=false, a probe leaves a line only if it fails."""
        self.app.config["LOG_PROBES"] = False
        for path in ("/ping", "/health/live", "/health/ready"):
            with self.subTest(path):
                self.assertEqual([], self.lines(path))
                self.assertEqual([], self.lines(path, "HEAD"))
        fault = errors.DatabaseUnavailable(retry_after=1)
        with mock.patch("project.lib.readiness.check", side_effect=fault):
            self.assertEqual(503, self.line("/health/ready")["status"])
        self.assertEqual(405, self.line("/ping", "POST")["status"])
        self.assertEqual(404, self.line("/nothing")["status"])

    def test_one_id(self) -> None:
        """All log lines of one request have the same request ID."""
        user = {"username": "test", "email": "test@test.com", "password": "test"}
        happened = self.lines("/auth/register", "POST", json=user)
        with mock.patch("project.accounts.directory.find", side_effect=RuntimeError):
            failed = self.lines("/users/1")

        self.assertEqual(["registered", "request"], [line["event"] for line in happened])
        self.assertEqual(["unhandled_exception", "request"], [line["event"] for line in failed])
        for lines in (happened, failed):
            self.assertEqual(1, len({line["request_id"] for line in lines}))
        self.assertEqual(happened[0]["request_id"], stored_events()[0]["request_id"])

    def test_path(self) -> None:
        """A long path is truncated, and a token in it is replaced."""
        token = self.register()

        self.assertEqual("/users/[secret]", self.line(f"/users/{token}")["path"])
        self.assertEqual(256, len(self.line("/" + "x" * 5000)["path"]))

    def test_secrets(self) -> None:
        """A hash or an encoded token in a path or request ID is not logged."""
        token = self.register()
        hashed = stored_users()[0]["password"]

        self.assertEqual("/users/[secret]", self.line(f"/users/{quote(hashed, safe='')}")["path"])
        twice = token.replace(".", "%252e")
        self.assertEqual("/users/[secret]", self.line(f"/users/{twice}")["path"])
        short = "eyJhbGciOiJIUzI1NiJ9.e30.c2lnbmF0dXJl"
        line = self.line("/ping", headers={"X-Request-ID": short})
        self.assertRegex(line["request_id"], GENERATED)

    def test_made_up_methods(self) -> None:
        """A method that HTTP does not define is logged as "other"."""
        for method in ("PROPFIND", "M" * 30_000):
            with self.subTest(method[:10]):
                self.assertEqual("other", self.line("/ping", method)["method"])

    def test_length(self) -> None:
        """A line stays below the size that a pipe writes at once, and is still JSON."""
        path = quote("/users/" + "\N{GRINNING FACE}" * 3_000)
        agent = {"HTTP_USER_AGENT": "\N{GRINNING FACE}".encode().decode("latin-1") * 3_000}
        body = {"email": "a@b.c", "password": "x"}
        with captured_log(readable=False) as lines:
            self.client.get(path)
            self.client.post("/auth/login", json=body, environ_overrides=agent)
            structlog.get_logger().error(
                "long", stack=f"first{'x' * 20_000}last", more=list(range(5_000))
            )

        logged = lines.getvalue().splitlines()
        self.assertEqual(4, len(logged))
        for line in logged:
            self.assertLess(len(line), logs.AT_ONCE)
        self.assertRegex(json.loads(logged[-1])["stack"], r"\Afirstx* \.\.\. .*xlast\Z")

    def test_readable(self) -> None:
        """In development the line is readable."""
        with captured_log(readable=True) as lines:
            self.get("/ping")

        (line,) = lines.getvalue().splitlines()
        for word in ("request", "GET", "/ping", "200"):
            self.assertIn(word, line)

    def test_database_unavailable(self) -> None:
        """Lines logged below the views have the request ID too."""
        with (
            captured_log(readable=False) as lines,
            mock.patch("project.accounts.directory.find", broken),
        ):
            response = self.get("/users/1")

        logged = [json.loads(line) for line in lines.getvalue().splitlines()]
        self.assertEqual(2, len(logged))
        for line in logged:
            self.assertEqual(response.headers["X-Request-ID"], line["request_id"])


def broken(*_: object, **__: object) -> None:
    """Send a statement that the database refuses."""
    from project.extensions import db

    db.session.execute(text("SELECT nothing FROM nowhere"))


class TestBrokenOutput(BaseTestCase):
    """A log that can't be written."""

    def test_broken(self) -> None:
        """A request is answered even when its line can't be written."""

        class Broken(io.StringIO):
            def write(self, _: str) -> int:
                attempts.append("write")
                raise BrokenPipeError

            def flush(self) -> None:
                raise OSError(28, "No space left on device")

        attempts: list[str] = []
        for output in (logs.Output(None), logs.DeferredOutput(None)):
            output.write("nowhere")
            output.flush()
        self.addCleanup(logs.configure, readable=True)
        logs.configure(readable=False, file=Broken())
        self.assertEqual(200, self.get("/ping").status_code)

        self.assertEqual(["write"], attempts)
