"""The log: whatever a client sends, a line is one of ours and says what we wrote."""

import contextlib
import io
import json
import logging
import os
import re
import sys
import threading
import time
import unittest
import warnings
from collections.abc import Iterator
from itertools import cycle, product
from unittest import mock
from urllib.parse import quote

import structlog
from flask import Response
from sqlalchemy import create_engine, text

from project import logs
from project.config import database_url
from project.tests import scratch
from project.tests.base import BaseTestCase
from project.tests.scratch import Service

# Each may begin a line, a key, a color or another direction somewhere.
TRICKS = [
    '\n{"event": "FORGED", "level": "info"}',
    "\r\n[INFO] FORGED",
    " event=FORGED user_id=1",
    "' event='FORGED",
    '", "event": "FORGED',
    "\x1b[2K\x1b[1GFORGED",
    "\x9b31mFORGED",
    "\x7f\x08\x08FORGED",
    "\x85FORGED\x0b\x0c\x1c\x1d\x1e",
    "\u2028FORGED\u2029",
    "\u202eDEGROF\u2066\u200f\ufeff",
    "%s%n${jndi:ldap:FORGED}{0}",
    "\\nFORGED\\u000a",
    "FORGED\0",
]
TEXT = "hunter2"  # of an exception
# What the readable form itself has in it, and before each line but those of a stack.
COLOR = re.compile(r"\x1b\[[0-9]*m")
TIMED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z +\[[a-z]+ *\] ")
# What Granian writes for each request where it is told to.
ACCESS = re.compile(r'\A\[[0-9: +-]+\] [0-9.]+ - "[A-Z]+ ([^"\\]|\\.)* HTTP/1.1" \d{3} [0-9.]+\Z')


@contextlib.contextmanager
def written(*, readable: bool) -> Iterator[io.StringIO]:
    """Collect what is logged, in one form or the other."""
    lines = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.callback(logs.configure, readable=True)
        stack.enter_context(contextlib.redirect_stdout(lines))
        stack.enter_context(contextlib.redirect_stderr(lines))
        logs.configure(readable=readable)
        # A logger that was used once keeps its form: each module's own is replaced.
        for name, module in list(sys.modules.items()):
            if name.startswith("project.") and hasattr(module, "log"):
                stack.enter_context(mock.patch.object(module, "log", structlog.get_logger()))
        yield lines


class TestForms(BaseTestCase):
    """Both forms, given what cannot be printed."""

    def fail_at(self, trick: str) -> str:
        """Make a request whose path ends on `trick` fail, and return the path as it is read."""
        path = f"/users/{trick}"
        with mock.patch("project.identifiers.parse", side_effect=RuntimeError(TEXT)):
            response = self.client.get(quote(path))
        self.assertEqual(500, response.status_code)
        return path

    def faults(self, lines: io.StringIO) -> list[dict[str, str]]:
        """Return the faults that were logged, each line being JSON of ours."""
        *whole, rest = lines.getvalue().split("\n")
        self.assertEqual("", rest)
        logged = [json.loads(line) for line in whole]
        for line, entry in zip(whole, logged, strict=True):
            self.assertTrue(line.isascii() and line.isprintable(), line)
            self.assertNotRegex(" ".join([entry["event"], *entry]), "FORGED|DEGROF")
        return [entry for entry in logged if entry["event"] == "unhandled_exception"]

    def test_production(self) -> None:
        """Where lines are JSON, each is one object in plain ASCII that holds what was sent."""
        for trick in TRICKS:
            with self.subTest(trick=trick), written(readable=False) as lines:
                path = self.fail_at(trick)

                self.assertEqual([path], [fault["path"] for fault in self.faults(lines)])

    def test_readable(self) -> None:
        """Elsewhere a line begins with the time, or is of a stack, and quotes what was sent."""
        for trick in TRICKS:
            with self.subTest(trick=trick), written(readable=True) as lines:
                path = self.fail_at(trick)
                plain = COLOR.sub("", lines.getvalue())

                self.assertIn(f"path={path!r}", plain)
                for line in plain.split("\n"):
                    self.assertTrue(line == "" or line.isprintable(), line)
                    if not TIMED.match(line):
                        self.assertNotRegex(line, f"FORGED|DEGROF|{TEXT}")

    def test_headers(self) -> None:
        """A user agent and a forwarded address are no way in either."""
        self.register()
        for readable, trick in product((True, False), TRICKS):
            stolen = pair = self.login().get_json()
            for _ in range(2):
                pair = self.client.post("/auth/refresh", json=refresh_of(pair)).get_json()
            environ = {"HTTP_USER_AGENT": trick, "HTTP_X_FORWARDED_FOR": trick}
            with self.subTest(trick=trick), written(readable=readable) as lines:
                reuse = {"json": refresh_of(stolen), "environ_overrides": environ}
                self.client.post("/auth/refresh", **reuse)
                plain = COLOR.sub("", lines.getvalue())

            # The event, and the code of the answer.
            self.assertEqual(2, plain.count("refresh_reused"))
            for line in plain.split("\n")[:-1]:
                self.assertTrue(line.isprintable(), line)
                self.assertRegex(line, TIMED if readable else "^{.*}$")

    def test_fault_outside_of_any_view(self) -> None:
        """What Flask would log by itself is logged like all else, without the exception's text."""

        def fail(response: Response) -> Response:
            if next(failures):
                raise RuntimeError(TEXT)
            return response

        failures = cycle([True, False])
        self.app.after_request(fail)
        self.app.config["PROPAGATE_EXCEPTIONS"] = False
        for trick in TRICKS:
            with self.subTest(trick=trick), written(readable=False) as lines:
                response = self.client.get(quote(f"/ping{trick}"))

                self.assert_error(
                    response, 500, "Something went wrong. Please try again.", "internal_error"
                )
                self.assertEqual([f"/ping{trick}"], [each["path"] for each in self.faults(lines)])
                self.assertNotIn(TEXT, lines.getvalue())

    def test_access_log(self) -> None:
        """The server's own, which is given paths as they were meant, writes them in one line."""
        log = logging.getLogger("granian.access")
        for trick in TRICKS:
            with self.subTest(trick=trick), self.assertLogs(log) as caught:
                log.info('"%(path)s" %(status)d', {"path": trick, "status": 404})

                self.assertEqual(f"{json.dumps(trick)} 404", caught.records[0].getMessage())


class TestDeferred(unittest.TestCase):
    """Lines that a thread writes: all that a server prints."""

    def setUp(self) -> None:
        """Make a pipe, and a thread in the place of the main one."""
        reader, writer = os.pipe()
        self.reader = self.enterContext(os.fdopen(reader, "rb", buffering=0))
        self.writer = os.fdopen(writer, "w")
        self.addCleanup(self.close)
        self.others = set(threading.enumerate())
        self.over = threading.Event()
        self.main = threading.Thread(target=self.over.wait)
        self.main.start()
        self.addCleanup(self.end)
        self.enterContext(mock.patch("threading.main_thread", return_value=self.main))

    def close(self) -> None:
        """Close the end that is written to, whether or not there is another."""
        with contextlib.suppress(BrokenPipeError):
            self.writer.close()

    def end(self) -> None:
        """End what stands for the process, and wait until its last line is written."""
        self.over.set()
        for thread in set(threading.enumerate()) - self.others:
            thread.join(10)
            self.assertFalse(thread.is_alive())

    def test_all_of_it(self) -> None:
        """Each line is written, in order and whole, the last ones after the main thread's end."""
        output = logs.DeferredOutput(self.writer)
        lines = [f"{number} {'x' * (number % 900)}\n" for number in range(1_000)]
        chunks: list[bytes] = []

        def read() -> None:
            while sum(map(len, chunks)) < sum(map(len, lines)):
                chunks.append(self.reader.read(65_536))

        reader = threading.Thread(target=read)
        reader.start()
        for line in lines:
            output.write(line)
        self.end()
        reader.join(10)

        self.assertEqual("".join(lines), b"".join(chunks).decode())

    def test_no_more_than_a_pipe_keeps_together(self) -> None:
        """What is written at once is whole lines, and so short that other processes' stay apart."""
        written: list[str] = []
        output = logs.DeferredOutput(mock.Mock(write=written.append))
        for number in range(500):
            output.write(f"{number} {'x' * 99}\n")
        self.end()

        self.assertEqual(500, "".join(written).count("\n"))
        self.assertLess(len(written), 100)
        for chunk in written:
            self.assertLessEqual(len(chunk), logs.AT_ONCE)
            self.assertTrue(chunk.endswith("\n"))

    def test_nobody_reads(self) -> None:
        """Who writes never waits; what does not fit is lost, and that is said when it can be."""
        may_write = threading.Event()
        written: list[str] = []

        def write(text: str) -> None:
            may_write.wait(10)
            written.append(text)

        self.enterContext(mock.patch("project.logs.MAX_WAITING", 10))
        output = logs.DeferredOutput(mock.Mock(write=write))
        for number in range(100):
            output.write(f"{number}\n")
        may_write.set()
        self.end()

        *kept, lost = "".join(written).splitlines()
        self.assertEqual([str(number) for number in range(len(kept))], kept)
        self.assertEqual(100 - len(kept), json.loads(lost)["lines"])
        self.assertEqual("lines_lost", json.loads(lost)["event"])

    def test_gone(self) -> None:
        """Where nobody will ever read, nothing fails."""
        self.reader.close()
        output = logs.DeferredOutput(self.writer)
        output.write("x\n")
        self.end()

    def test_child(self) -> None:
        """A process that was forked writes its own lines, and none of its parent's."""
        output = logs.DeferredOutput(self.writer)
        output.write("parent\n")
        with warnings.catch_warnings(action="ignore"):  # that a process with threads forks
            child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                output.write("child\n")
                time.sleep(4 * logs.DEFERRED_FOR)
            os._exit(0)
        os.waitpid(child, 0)
        self.end()

        lines = self.reader.read(1_000).decode().split()
        self.assertEqual(["child", "parent"], sorted(lines))


def refresh_of(pair: dict[str, str]) -> dict[str, str]:
    """Return the body that refreshes with a pair of tokens."""
    return {"refresh_token": pair["refresh_token"]}


class TestServer(unittest.TestCase):
    """A server of production, and all that it prints."""

    def send(self, method: str, path: str, trick: str, *, body: str = "", token: str = "") -> None:
        """Send a request twice, once with the trick in its headers too, where it may be refused."""
        content = body.encode()
        for agent in ("plain", trick):
            head = [
                f"{method} {quote(path, safe='/?=')} HTTP/1.1",
                "Host: test",
                "Connection: close",
                "Content-Type: application/json",
                f"Content-Length: {len(content)}",
                f"User-Agent: {agent}",
                f"X-Forwarded-For: {agent}, 192.0.2.1",
                f"X-Request-ID: {agent}",
                f"Authorization: Bearer {token}" if token else f"Authorization: {agent}",
            ]
            with self.service.connect() as connection:
                connection.sendall("\r\n".join([*head, "", ""]).encode() + content)
                self.assertTrue(connection.recv(4096).startswith(b"HTTP/1.1 "))

    def test_every_line_is_ours(self) -> None:
        """Each line is a JSON object whose event is one of ours, or of the server itself."""
        url = self.enterContext(scratch.database())
        self.service = self.enterContext(
            Service(url, TRUSTED_PROXIES="1", GRANIAN_LOG_ACCESS_ENABLED="true")
        )
        _, first, _ = self.service.register("user")
        pair = first
        for _ in range(2):
            _, pair, _ = self.service.request("POST", "/auth/refresh", refresh_of(pair))
        self.send("POST", "/auth/refresh", TRICKS[3], body=json.dumps(refresh_of(first)))
        _, pair, _ = self.service.login("user")
        for trick in TRICKS:
            login = json.dumps({"email": f"{trick}@test.com", "password": trick, trick: trick})
            for body in ("", trick, login, json.dumps({"refresh_token": trick})):
                self.send("POST", "/auth/login", trick, body=body)
                self.send("POST", "/auth/refresh", trick, body=body)
            for path in ("/", "/users/", "/users?after=", "/auth/sessions/"):
                self.send("GET", path + trick, trick)
        engine = create_engine(database_url(url))
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE users RENAME COLUMN active TO gone"))
        engine.dispose()
        # From here on whoever is logged in is a fault.
        for trick in TRICKS:
            self.send("GET", f"/users/{trick}", trick, token=pair["auth_token"])
        self.service.stop()

        fault = "unhandled_exception" if url.startswith("postgres") else "database_unavailable"
        events = []
        for line in self.service.log.split("\n")[:-1]:
            with self.subTest(line=line):
                self.assertTrue(line.isascii() and line.isprintable())
                entry = json.loads(line)
                if entry.get("logger") == "granian.access":
                    self.assertRegex(entry["event"], ACCESS)
                elif entry.get("logger") == "granian":
                    self.assertNotIn("FORGED", line)
                else:
                    events.append(entry["event"])
        self.assertLessEqual({"refresh_reused", "request", fault}, set(events))
        self.assertNotIn("FORGED", events)
