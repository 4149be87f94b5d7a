"""The log: no client can forge a line, and no line discloses an exception's text."""

import contextlib
import fcntl
import io
import json
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
import warnings
from itertools import cycle, product
from unittest import mock
from urllib.parse import quote

from flask import Response
from sqlalchemy import create_engine, text

from project import errors
from project.config import database_url
from project.lib import logs
from project.tests import scratch
from project.tests.base import BaseTestCase
from project.tests.lib.log_capture import INJECTIONS, captured_log
from project.tests.scratch import Service

EXCEPTION_TEXT = "hunter2"
# The colors of the readable format, and the time with which each of its entries starts.
COLOR = re.compile(r"\x1b\[[0-9]*m")
TIMESTAMPED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z +\[[a-z]+ *\] ")
# A line of Granian's own access log.
ACCESS = re.compile(r'\A\[[0-9: +-]+\] [0-9.]+ - "[A-Z]+ ([^"\\]|\\.)* HTTP/1.1" \d{3} [0-9.]+\Z')


class TestFormats(BaseTestCase):
    """JSON and readable lines, given text that could forge a line."""

    def fail_at(self, injection: str) -> str:
        """Request a path that ends with `injection` and fails; return the decoded path."""
        path = f"/users/{injection}"
        with mock.patch("project.ids.parse", side_effect=RuntimeError(EXCEPTION_TEXT)):
            response = self.client.get(quote(path))
        self.assertEqual(500, response.status_code)
        return path

    def faults(self, lines: io.StringIO) -> list[dict[str, str]]:
        """Return the logged exceptions, and check that each line is JSON of the service."""
        *whole, rest = lines.getvalue().split("\n")
        self.assertEqual("", rest)
        logged = [json.loads(line) for line in whole]
        for line, entry in zip(whole, logged, strict=True):
            self.assertTrue(line.isascii() and line.isprintable(), line)
            self.assertNotRegex(" ".join([entry["event"], *entry]), "FORGED|DEGROF")
        return [entry for entry in logged if entry["event"] == "unhandled_exception"]

    def test_production(self) -> None:
        """In production each entry is a JSON object in printable ASCII with the path as sent."""
        for injection in INJECTIONS:
            with self.subTest(injection=injection), captured_log(readable=False) as lines:
                path = self.fail_at(injection)

                self.assertEqual([path], [fault["path"] for fault in self.faults(lines)])

    def test_readable(self) -> None:
        """In development each line starts with the time or is part of a traceback."""
        for injection in INJECTIONS:
            with self.subTest(injection=injection), captured_log(readable=True) as lines:
                path = self.fail_at(injection)
                plain = COLOR.sub("", lines.getvalue())

                self.assertIn(f"path={path!r}", plain)
                for line in plain.split("\n"):
                    self.assertTrue(line == "" or line.isprintable(), line)
                    if not TIMESTAMPED.match(line):
                        self.assertNotRegex(line, f"FORGED|DEGROF|{EXCEPTION_TEXT}")

    def test_headers(self) -> None:
        """User-Agent and X-Forwarded-For can't forge a line either."""
        self.register()
        for readable, injection in product((True, False), INJECTIONS):
            stolen = pair = self.login().get_json()
            for _ in range(2):
                pair = self.client.post("/auth/refresh", json=refresh_of(pair)).get_json()
            environ = {"HTTP_USER_AGENT": injection, "HTTP_X_FORWARDED_FOR": injection}
            with self.subTest(injection=injection), captured_log(readable=readable) as lines:
                reuse = {"json": refresh_of(stolen), "environ_overrides": environ}
                self.client.post("/auth/refresh", **reuse)
                plain = COLOR.sub("", lines.getvalue())

            # As the event, and as the code in the access log.
            self.assertEqual(2, plain.count("refresh_reused"))
            for line in plain.split("\n")[:-1]:
                self.assertTrue(line.isprintable(), line)
                self.assertRegex(line, TIMESTAMPED if readable else "^{.*}$")

    def test_error_outside_of_any_view(self) -> None:
        """An exception that Flask would log is logged without its text."""

        def fail(response: Response) -> Response:
            if next(failures):
                raise RuntimeError(EXCEPTION_TEXT)
            return response

        failures = cycle([True, False])
        self.app.after_request(fail)
        self.app.config["PROPAGATE_EXCEPTIONS"] = False
        for injection in INJECTIONS:
            with self.subTest(injection=injection), captured_log(readable=False) as lines:
                response = self.client.get(quote(f"/ping{injection}"))

                self.assert_error(response, errors.InternalError)
                self.assertEqual(
                    [f"/ping{injection}"], [each["path"] for each in self.faults(lines)]
                )
                self.assertNotIn(EXCEPTION_TEXT, lines.getvalue())

    def test_access_log(self) -> None:
        """Granian's access log, which gets decoded paths, writes them escaped in one line."""
        log = logging.getLogger("granian.access")
        for injection in INJECTIONS:
            with self.subTest(injection=injection), self.assertLogs(log) as caught:
                log.info('"%(path)s" %(status)d', {"path": injection, "status": 404})

                self.assertEqual(f"{json.dumps(injection)} 404", caught.records[0].getMessage())


class TestDeferred(unittest.TestCase):
    """Lines that a thread writes, which are all lines of a server."""

    def setUp(self) -> None:
        """Make a pipe, and a thread in place of the main thread."""
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
        """Close the writing end, even when the reading end is closed."""
        with contextlib.suppress(BrokenPipeError):
            self.writer.close()

    def end(self) -> None:
        """End the main thread, and wait until the last line is written."""
        self.over.set()
        for thread in set(threading.enumerate()) - self.others:
            thread.join(10)
            self.assertFalse(thread.is_alive())

    def test_every_line_is_written(self) -> None:
        """Each line is written whole and in order, the last ones after the main thread ends."""
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

    def test_atomic_writes(self) -> None:
        """Each write is whole lines, and short enough that a pipe does not mix processes."""
        reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        written: list[bytes] = []
        with reader, writer:
            output = logs.DeferredOutput(mock.Mock(fileno=writer.fileno))
            for number in range(500):
                output.write(f"{number} {'x' * 99}\n")
            self.end()
            writer.close()
            while chunk := reader.recv(2 * logs.AT_ONCE):
                written.append(chunk)

        self.assertEqual(500, b"".join(written).count(b"\n"))
        self.assertLess(len(written), 100)
        for chunk in written:
            self.assertLessEqual(len(chunk), logs.AT_ONCE)
            self.assertTrue(chunk.endswith(b"\n"))

    def test_no_reader(self) -> None:
        """While nobody reads, no caller waits; lost lines are counted, and logged later."""
        self.enterContext(mock.patch("project.lib.logs.MAX_WAITING", 10))
        count = self.enterContext(mock.patch("project.lib.logs._count_lost"))
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, logs.AT_ONCE)
        output = logs.DeferredOutput(self.writer)
        lines = [f"{number} {'x' * 1000}\n" for number in range(100)]
        for line in lines:
            output.write(line)
        chunks = [self.reader.read(65_536)]
        self.over.set()
        while (chunk := self.reader.read(65_536)) and b"lines_lost" not in chunk:
            chunks.append(chunk)

        kept = b"".join(chunks).decode().splitlines(keepends=True)
        *last, lost = chunk.decode().splitlines(keepends=True)
        kept += last
        self.assertEqual(lines[: len(kept)], kept)
        self.assertEqual(100 - len(kept), json.loads(lost)["lines"])
        self.assertEqual([mock.call(1)] * (100 - len(kept)), count.call_args_list)

    def test_lines_that_fail(self) -> None:
        """Lines that the system refuses to write raise no error, and are counted once."""
        count = self.enterContext(mock.patch("project.lib.logs._count_lost"))
        self.enterContext(mock.patch("project.lib.logs.DEFERRED_FOR", 0.001))
        self.reader.close()
        output = logs.DeferredOutput(self.writer)
        output.write("x\n")
        time.sleep(0.02)  # long enough for several attempts to log the number
        self.end()

        self.assertEqual([mock.call(1)], count.call_args_list)

    def test_end_without_a_reader(self) -> None:
        """A process whose last lines nobody reads ends within END_TIMEOUT, without them."""
        self.enterContext(mock.patch("project.lib.logs.END_TIMEOUT", 0.01))
        output = logs.DeferredOutput(self.writer)
        for _ in range(50):
            output.write("x" * 3_999 + "\n")
        self.over.set()
        started = set(threading.enumerate()) - self.others
        ending = next(one for one in started if one.name == "log-end")
        ending.join(10)

        self.assertFalse(ending.is_alive())
        writing = set(threading.enumerate()) - self.others - {self.main}
        self.assertEqual([True], [one.daemon for one in writing])
        self.reader.close()

    def test_child(self) -> None:
        """A forked process writes its own lines, and none of its parent's."""
        output = logs.DeferredOutput(self.writer)
        output.write("parent\n")
        with warnings.catch_warnings(action="ignore"):  # of a fork in a process with threads
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
    """Return the body that refreshes a token pair."""
    return {"refresh_token": pair["refresh_token"]}


class TestServer(unittest.TestCase):
    """All that a production server prints."""

    def test_no_reader(self) -> None:
        """A server whose output nobody reads answers, ends on SIGTERM, and cuts no line."""
        port = scratch.free_port()
        with scratch.database() as url:
            server = subprocess.Popen(
                [sys.executable, "manage.py", "serve"],
                cwd=scratch.ROOT,
                env=scratch.settings(
                    APP_SETTINGS="project.config.ProductionConfig",
                    DATABASE_URL=url,
                    SECRET_KEY=secrets.token_hex(32),
                    GRANIAN_HOST="127.0.0.1",
                    GRANIAN_PORT=str(port),
                ),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self.addCleanup(server.kill)
            output = server.stdout
            assert output is not None  # noqa: S101  # for mypy
            fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, logs.AT_ONCE)
            started = 0
            while started < 2:
                self.assertNotEqual("", line := output.readline())
                started += "Started worker" in line
            for _ in range(100):
                self.assertEqual(401, scratch.request(port, "GET", "/users")[0])
            server.send_signal(signal.SIGTERM)
            self.assertEqual(0, server.wait(15))  # Granian kills its workers after 20 seconds

        for line in output:
            self.assertIn("event", json.loads(line))
        output.close()

    def send(
        self, method: str, path: str, injection: str, *, body: str = "", token: str = ""
    ) -> None:
        """Send a request twice: plainly, and with the injection in its headers."""
        content = body.encode()
        for agent in ("plain", injection):
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

    def test_level(self) -> None:
        """With LOG_LEVEL=warning, requests and ordinary events are not logged; a theft is."""
        url = self.enterContext(scratch.database())
        levels = {"LOG_LEVEL": "warning", "GRANIAN_LOG_LEVEL": "info"}
        with Service(url, **levels) as service:
            _, first, _ = service.register("user")
            pair = first
            for _ in range(2):
                _, pair, _ = service.request("POST", "/auth/refresh", refresh_of(pair))
            service.request("POST", "/auth/refresh", refresh_of(first))

        lines = map(json.loads, service.log.splitlines())
        ours = [line["event"] for line in lines if "logger" not in line]
        self.assertEqual(["refresh_reused"], ours)

    def test_no_warnings(self) -> None:
        """A server with the default settings, or with many processes, starts without a warning."""
        url = self.enterContext(scratch.database())
        for workers in ("2", "8"):
            with self.subTest(workers), Service(url, GRANIAN_WORKERS=workers) as service:
                service.wait_for_output("Started worker", times=int(workers))
                self.assertEqual(200, service.request("GET", "/health/live")[0])
            levels = {json.loads(line)["level"] for line in service.log.splitlines()}
            self.assertEqual({"info"}, levels)
            self.assertNotIn("/health/live", service.log)

    def test_every_line_is_json(self) -> None:
        """Each line is a JSON object with an event of the service or of Granian."""
        url = self.enterContext(scratch.database())
        self.service = self.enterContext(
            Service(url, TRUSTED_PROXIES="1", GRANIAN_LOG_ACCESS_ENABLED="true")
        )
        _, first, _ = self.service.register("user")
        pair = first
        for _ in range(2):
            _, pair, _ = self.service.request("POST", "/auth/refresh", refresh_of(pair))
        self.send("POST", "/auth/refresh", INJECTIONS[3], body=json.dumps(refresh_of(first)))
        _, pair, _ = self.service.login("user")
        for injection in INJECTIONS:
            login = json.dumps(
                {"email": f"{injection}@test.com", "password": injection, injection: injection}
            )
            for body in ("", injection, login, json.dumps({"refresh_token": injection})):
                self.send("POST", "/auth/login", injection, body=body)
                self.send("POST", "/auth/refresh", injection, body=body)
            for path in ("/", "/users/", "/users?after=", "/auth/sessions/"):
                self.send("GET", path + injection, injection)
        engine = create_engine(database_url(url))
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE users RENAME COLUMN active TO gone"))
        engine.dispose()
        # From here on every request with a valid token is a server error.
        for injection in INJECTIONS:
            self.send("GET", f"/users/{injection}", injection, token=pair["auth_token"])
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
