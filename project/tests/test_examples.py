"""The clients in examples/: what they send, store and wait for, in Python and in TypeScript."""

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from bench import lines
from examples import client as python_client
from project import clock
from project.tests import scratch
from project.tokens import codec

NODE, TSC = shutil.which("node"), shutil.which("tsc")
TYPESCRIPT = scratch.ROOT / "examples" / "client.ts"
DRIVER = Path(__file__).with_name("client_driver.ts")
STRICT = (
    *("--strict", "--noUncheckedIndexedAccess", "--exactOptionalPropertyTypes"),
    *("--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom"),
)
SECRET_KEY = "0123456789abcdef" * 4
DAY = 86_400  # seconds
CREDENTIALS = "ada@test.com", "test"
STATUS = "GET", "/auth/status"
# The answer of the stub to every request that has no other one.
PAIR: dict[str, Any] = {"auth_token": "a1", "refresh_token": "r1", "expires_in": 1_000}


Answer = tuple[int, dict[str, str], bytes]  # status, headers and body


class Result(NamedTuple):
    """What came of one call: the response, or the status, code and Retry-After of a refusal."""

    answer: Any = None
    status: int | None = None
    code: str | None = None
    wait: int | None = None
    failure: str | None = None  # there was no response


class PythonDriver:
    """Clients of examples/client.py, whose time does not pass by itself."""

    def __init__(self, test: unittest.TestCase, url: str) -> None:
        self.stored: dict[str, Any] | None = None
        self.waits: list[float] = []
        self._moved = 0.0
        now = time.time
        for name, function in (
            ("time", lambda: now() + self._moved),
            ("sleep", self.waits.append),
        ):
            test.enterContext(mock.patch.object(python_client, name, function))
        self._client = python_client.Client(url, save=self._save)
        self._url = url

    def _save(self, pair: dict[str, Any] | None) -> None:
        self.stored = pair

    def store(self, pair: dict[str, Any]) -> None:
        """Continue a session with this pair."""
        self._client = python_client.Client(self._url, pair, self._save)
        self.stored = pair

    def move_clock(self, seconds: float) -> None:
        """Let this time pass for the client."""
        self._moved += seconds

    def log_in(self, *code: str) -> Result:
        """Log in, with a code or without one."""
        return self._result("log_in", *CREDENTIALS, *code)

    def log_out(self) -> Result:
        """Log out."""
        return self._result("log_out")

    def call(self, times: int = 1) -> Sequence[Result]:
        """Request the caller, so many times at once."""
        with ThreadPoolExecutor(times) as pool:
            return list(pool.map(lambda _: self._result("call", *STATUS), range(times)))

    def _result(self, method: str, *arguments: str) -> Result:
        try:
            return Result(getattr(self._client, method)(*arguments))
        except python_client.ApiError as error:
            return Result(None, error.status, error.code, error.retry_after)
        except OSError as error:
            return Result(failure=repr(error))


class TypeScriptDriver:
    """Two tabs with clients of examples/client.ts, in a process of node."""

    def __init__(self, test: unittest.TestCase, folder: Path, url: str, locks: bool) -> None:
        self.stored: dict[str, Any] | None = None
        self.waits: list[float] = []
        command = [str(NODE), str(folder / "client_driver.js")]
        self._process = test.enterContext(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        test.addCleanup(self._process.kill)
        self._execute("open", url, locks, tabs=())

    def store(self, pair: dict[str, Any]) -> None:
        """Continue a session with this pair."""
        self._execute("store", json.dumps(_in_milliseconds(pair, 1_000)), tabs=())

    def move_clock(self, seconds: float) -> None:
        """Let this time pass for the clients."""
        self._execute("move", seconds, tabs=())

    def log_in(self, *code: str) -> Result:
        """Log in, in the first tab, with a code or without one."""
        return self._execute("logIn", *CREDENTIALS, *code)[0]

    def log_out(self) -> Result:
        """Log out, in the second tab."""
        return self._execute("logOut", tabs=[1])[0]

    def call(self, times: int = 1) -> Sequence[Result]:
        """Request the caller so many times at once, in both tabs."""
        return self._execute("call", *STATUS, tabs=[number % 2 for number in range(times)])

    def _execute(self, what: str, *arguments: object, tabs: Sequence[int] = (0,)) -> list[Result]:
        assert self._process.stdin and self._process.stdout  # noqa: S101  # for mypy
        command = {"tabs": tabs, "do": what, "arguments": arguments}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        done = json.loads(self._process.stdout.readline())
        pair = json.loads(done["stored"]) if done["stored"] else None
        self.stored, self.waits = pair and _in_milliseconds(pair, 0.001), done["waits"]
        return [Result(**result) for result in done["results"]]


def _in_milliseconds(pair: dict[str, Any], factor: float) -> dict[str, Any]:
    return pair | {"refresh_at": pair["refresh_at"] * factor}


class Stub(ThreadingHTTPServer):
    """A server that answers what a test tells it to, and records the requests."""

    def __init__(self, *answers: Answer | None) -> None:
        super().__init__(("127.0.0.1", 0), _StubHandler)
        self.answers = list(answers)
        self.requests: list[tuple[str, str | None, Any]] = []  # path, token and body
        self.url = f"http://127.0.0.1:{self.server_port}"


class _StubHandler(BaseHTTPRequestHandler):
    server: Stub

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.server.requests.append((self.path, token, json.loads(body) if body else None))
        scripted = self.server.answers.pop(0) if self.server.answers else answer(200, **PAIR)
        if scripted is None:
            return  # the connection is closed without a response
        status, headers, content = scripted
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _answer  # noqa: N815  # names of the standard library

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Print nothing."""


def answer(status: int, *, headers: dict[str, str] | None = None, **members: Any) -> Answer:
    """Return an answer of the stub."""
    return status, headers or {}, json.dumps(members).encode()


def after(seconds: int) -> dict[str, str]:
    """Return the header that asks a client to wait."""
    return {"Retry-After": str(seconds)}


@contextlib.contextmanager
def serve(*answers: Answer | None) -> Iterator[Stub]:
    """Yield a stub that gives these answers, and then PAIR; None is a lost response."""
    with Stub(*answers) as stub:
        thread = threading.Thread(target=stub.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield stub
        finally:
            stub.shutdown()
            thread.join()


Driver = PythonDriver | TypeScriptDriver
if TYPE_CHECKING:
    _Base = unittest.TestCase
else:
    _Base = object


class ClientTests(_Base):
    """The tests of every client."""

    def open(self, url: str) -> Driver:
        """Return a driver of the client."""
        raise NotImplementedError

    def logged_in(self, stub: Stub, **more: object) -> Driver:
        """Return a client that has logged in at the stub and got PAIR."""
        stub.answers.insert(0, answer(200, **PAIR | more))
        driver = self.open(stub.url)
        self.assertEqual(None, driver.log_in().status)
        stub.requests.clear()
        return driver

    def paths(self, stub: Stub) -> list[str]:
        """Return the paths of the requests."""
        return [path for path, *_ in stub.requests]

    def test_session(self) -> None:
        """Log in, call, refresh once for 20 calls, renew rejected tokens, and log out.

        This is a session with the service in production settings.
        """
        url = self.enterContext(scratch.database())
        service = self.enterContext(scratch.Service(url, SECRET_KEY=SECRET_KEY))
        self.assertEqual(201, service.register("ada")[0])
        driver = self.open(f"http://127.0.0.1:{service.port}")

        self.assertEqual(Result(None, 401, "token_missing"), driver.call()[0])
        self.assertEqual(None, driver.log_in().status)
        [told] = driver.call()
        self.assertEqual("ada", told.answer["data"]["username"])

        first = driver.stored
        driver.move_clock(16 * DAY)
        results = driver.call(times=20)
        self.assertEqual({"ada"}, {result.answer["data"]["username"] for result in results})
        assert first and driver.stored  # noqa: S101  # for mypy
        self.assertNotEqual(first["refresh_token"], driver.stored["refresh_token"])

        claims = codec.decode_access(
            driver.stored["auth_token"], keys=(SECRET_KEY,), now=clock.utcnow()
        )
        past = claims._replace(issued_at=1, expires_at=2)
        for rejected in (codec.encode_access(past, key=SECRET_KEY), "no.token.really"):
            driver.store(driver.stored | {"auth_token": rejected})
            [told] = driver.call()
            self.assertEqual("ada", told.answer["data"]["username"])

        last = driver.stored["auth_token"]
        self.assertEqual(None, driver.log_out().status)
        self.assertIsNone(driver.stored)
        self.assertEqual("session_ended", service.request(*STATUS, token=last)[1]["code"])
        service.stop()
        routes = re.findall(r'"route":"([^"]+)"', service.log)
        self.assertEqual(3, routes.count("/auth/refresh"))
        self.assertEqual(1 + 20 + 2 * 2 + 1, routes.count("/auth/status"))

    def test_retry_after(self) -> None:
        """A request that gets 429 or 503 is sent again after Retry-After."""
        with serve() as stub:
            stub.answers = [
                answer(429, headers=after(1), code="too_many_attempts"),
                answer(200, **PAIR),
            ]
            driver = self.open(stub.url)
            self.assertEqual(None, driver.log_in().status)
            self.assertEqual([1], driver.waits)

            stub.answers = [answer(503, headers=after(2), code="busy"), answer(200, data="x")]
            self.assertEqual([Result({"data": "x"})], driver.call())
            self.assertEqual([1, 2], driver.waits)
            self.assertEqual(2 * ["/auth/login"] + 2 * ["/auth/status"], self.paths(stub))

    def test_code(self) -> None:
        """A login that is refused without a code is sent again with one."""
        with serve(answer(401, code="mfa_required", mfa_token="m1")) as stub:
            driver = self.open(stub.url)

            self.assertEqual("mfa_required", driver.log_in().code)
            self.assertEqual(None, driver.log_in("123456").status)
            credentials = {"email": CREDENTIALS[0], "password": CREDENTIALS[1]}
            bodies = [body for _, _, body in stub.requests]
            self.assertEqual([credentials, credentials | {"code": "123456"}], bodies)
            self.assertIsNotNone(driver.stored)

    def test_tries(self) -> None:
        """A request is sent 4 times at most."""
        with serve() as stub:
            driver = self.logged_in(stub)
            stub.answers += 9 * [answer(503, headers=after(1), code="busy")]

            self.assertEqual([Result(None, 503, "busy", 1)], driver.call())
            self.assertEqual(4, len(stub.requests))
            self.assertEqual([1, 1, 1], driver.waits)

    def test_long_wait(self) -> None:
        """A Retry-After of more than 30 seconds is left to the caller."""
        with serve(answer(429, headers=after(31), code="too_many_attempts")) as stub:
            driver = self.open(stub.url)

            self.assertEqual(Result(None, 429, "too_many_attempts", 31), driver.log_in())
            self.assertEqual((1, []), (len(stub.requests), driver.waits))

    def test_other_refusals(self) -> None:
        """Other refusals are not repeated, whether they are JSON or not."""
        html = 502, {"Content-Type": "text/html", "Retry-After": "1"}, b"<html>"
        dated = 503, {"Retry-After": "Fri, 27 Nov 2026 09:00:00 GMT"}, b"{}"
        forbidden = answer(403, code="permission_denied")
        expected = [(502, ""), (503, ""), (403, "permission_denied")]
        for refusal, (status, code) in zip([html, dated, forbidden], expected, strict=True):
            with self.subTest(status), serve() as stub:
                driver = self.logged_in(stub)
                stub.answers = [refusal]

                self.assertEqual([Result(None, status, code)], driver.call())
                self.assertEqual((1, []), (len(stub.requests), driver.waits))
                self.assertIsNotNone(driver.stored)

    def test_lost_refresh(self) -> None:
        """A refresh without a response is repeated at once; another request is not."""
        with serve() as stub:
            driver = self.logged_in(stub)
            driver.move_clock(901)
            stub.answers = [None, answer(200, **PAIR | {"auth_token": "a2"}), answer(200, data=1)]

            self.assertEqual([Result({"data": 1})], driver.call())
            refresh = "/auth/refresh", None, {"refresh_token": "r1"}
            self.assertEqual([refresh, refresh, ("/auth/status", "a2", None)], stub.requests)

            stub.answers = [None]
            self.assertIsNotNone(driver.call()[0].failure)
            self.assertEqual(4, len(stub.requests))
            self.assertIsNotNone(driver.stored)

    def test_when(self) -> None:
        """A refresh is due at 90 % of expires_in or half of refresh_expires_in."""
        for lifetimes, due in (
            ({"expires_in": 1_000, "refresh_expires_in": 5_000}, 900),
            ({"expires_in": 1_000, "refresh_expires_in": 1_000}, 500),
            ({"expires_in": 1_000}, 500),
        ):
            with self.subTest(lifetimes), serve() as stub:
                driver = self.logged_in(stub, **lifetimes)
                driver.move_clock(due - 10)
                driver.call()
                self.assertEqual(["/auth/status"], self.paths(stub))

                driver.move_clock(10)
                driver.call()
                self.assertEqual(["/auth/refresh", "/auth/status"], self.paths(stub)[1:])

    def test_session_over(self) -> None:
        """The pair is forgotten when a call or a refresh is refused because the session is over."""
        for code in ("session_ended", "account_inactive"):
            with self.subTest(code), serve() as stub:
                driver = self.logged_in(stub)
                stub.answers = [answer(401, code=code)]

                self.assertEqual([Result(None, 401, code)], driver.call())
                self.assertIsNone(driver.stored)
                self.assertEqual(["/auth/status"], self.paths(stub))
        for code in ("token_expired", "token_invalid", "session_ended", "refresh_reused"):
            with self.subTest(code), serve() as stub:
                driver = self.logged_in(stub)
                stub.answers = [answer(401, code="token_expired"), answer(401, code=code)]

                self.assertEqual([Result(None, 401, code)], driver.call())
                self.assertIsNone(driver.stored)
                self.assertEqual(["/auth/status", "/auth/refresh"], self.paths(stub))

    def test_rejected_twice(self) -> None:
        """A call is repeated once only after a refresh."""
        with serve() as stub:
            driver = self.logged_in(stub)
            stub.answers = [answer(401, code="token_invalid"), answer(200, **PAIR)]
            stub.answers.append(answer(401, code="token_invalid"))

            self.assertEqual([Result(None, 401, "token_invalid")], driver.call())
            self.assertEqual(3, len(stub.requests))

    def test_log_out_without_the_service(self) -> None:
        """The pair is forgotten even if the logout gets no response."""
        with serve() as stub:
            driver = self.logged_in(stub)
            stub.answers = [None]

            self.assertIsNotNone(driver.log_out().failure)
            self.assertIsNone(driver.stored)


class TestPythonClient(ClientTests, unittest.TestCase):
    """examples/client.py."""

    def open(self, url: str) -> Driver:
        """Return a driver of the client."""
        return PythonDriver(self, url)

    def test_length(self) -> None:
        """The client has fewer than 100 lines of code."""
        self.assertLess(lines.count(Path(python_client.__file__).read_text()), 100)


@unittest.skipUnless(NODE and TSC, "needs node and tsc")
class TestTypeScriptClient(ClientTests, unittest.TestCase):
    """examples/client.ts, in two tabs that share a storage and a lock."""

    folder: Path

    @classmethod
    def setUpClass(cls) -> None:
        """Compile the client, with every check of types."""
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        for source in (TYPESCRIPT, DRIVER):
            shutil.copy(source, cls.folder)
        (cls.folder / "package.json").write_text('{"type": "module"}')
        command = [str(TSC), *STRICT, "client.ts", "client_driver.ts"]
        done = subprocess.run(command, cwd=cls.folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(done.stdout + done.stderr)

    def open(self, url: str, *, locks: bool = True) -> Driver:
        """Return a driver of the client."""
        return TypeScriptDriver(self, self.folder, url, locks)

    def test_tabs_without_locks(self) -> None:
        """Without locks each tab refreshes once, and the service gives both the same pair."""
        url = self.enterContext(scratch.database())
        service = self.enterContext(scratch.Service(url))
        self.assertEqual(201, service.register("ada")[0])
        driver = self.open(f"http://127.0.0.1:{service.port}", locks=False)
        self.assertEqual(None, driver.log_in().status)
        driver.move_clock(16 * DAY)

        results = driver.call(times=20)

        self.assertEqual({"ada"}, {result.answer["data"]["username"] for result in results})
        self.assertEqual(None, driver.log_out().status)
        service.stop()
        routes = re.findall(r'"route":"([^"]+)"', service.log)
        self.assertEqual(2, routes.count("/auth/refresh"))

    def test_length(self) -> None:
        """The client has fewer than 100 lines of code."""
        code = re.sub(r"/\*.*?\*/", "", TYPESCRIPT.read_text(), flags=re.DOTALL)
        counted = [line for line in code.splitlines() if line.strip() and line.strip()[:2] != "//"]
        self.assertLess(len(counted), 100)
