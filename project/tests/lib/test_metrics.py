"""Metrics for Prometheus, of a server with two processes."""

import http.client
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import make_url

from bench.pgproxy import PostgresProxy
from project.config import VERSION
from project.tests import scratch
from project.tests.scratch import ON_POSTGRESQL, Service

TIMEOUT = 10  # seconds


class MetricsTestCase(unittest.TestCase):
    """A test with a server that exposes metrics."""

    def start(self, url: str | None = None, **environment: str) -> None:
        """Start the server."""
        self.port = scratch.free_port()
        self.service = self.enterContext(
            Service(
                url or self.enterContext(scratch.database()),
                METRICS_PORT=str(self.port),
                **environment,
            )
        )

    def text(self) -> str:
        """Return the response to Prometheus, retrying while a process is being replaced."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/metrics")
                answer = connection.getresponse()
                self.assertEqual(200, answer.status)
                self.assertIn("text/plain", answer.headers["Content-Type"])
                return answer.read().decode()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            finally:
                connection.close()

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Return each sample by its name and the values of its labels, ordered by label."""
        return {
            (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
        }

    def wait_for(self, value: float, *name: str, or_more: bool = False) -> None:
        """Wait until a metric has this value, or more."""
        deadline = time.monotonic() + TIMEOUT
        while (found := self.metrics().get(name, 0)) != value and not (or_more and found > value):
            self.assertLess(time.monotonic(), deadline, f"{name} is {found}")
            time.sleep(0.02)

    def directory(self) -> Path | None:
        """Return the directory in which the processes count, or None."""
        environment = Path(f"/proc/{self.service.process.pid}/environ").read_bytes().split(b"\0")
        for one in environment:
            if one.startswith(b"PROMETHEUS_MULTIPROC_DIR="):
                return Path(one.decode().partition("=")[2])
        return None

    def login(self) -> socket.socket:
        """Start a login with an unknown email, and return the connection."""
        line = self.service.connect()
        body = b'{"email": "a@b.c", "password": "password"}'
        line.sendall(
            b"POST /auth/login HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        return line


class TestMetrics(MetricsTestCase):
    """Which metrics there are."""

    def test_requests(self) -> None:
        """Requests to either process are counted and timed by route, never by path."""
        self.start()
        for number in range(40):  # each on a new connection, so that both processes get some
            self.service.request("GET", f"/users/{number + 7}")
            self.service.request("GET", f"/nothing/{number}")
            self.service.request(f"METHOD{number}", "/ping")

        found = self.metrics()

        answers, seconds = "users_http_requests_total", "users_http_request_seconds_count"
        rule = "/users/<user_id>"
        self.assertEqual(40, found[answers, "GET", rule, "401"])
        self.assertEqual(40, found[answers, "GET", "none", "404"])
        self.assertEqual(40, found[answers, "other", "none", "405"])
        self.assertEqual(40, found[seconds, "GET", rule])
        self.assertEqual(40, found["users_http_request_seconds_bucket", "+Inf", "GET", rule])
        self.assertLess(0, found["users_http_request_seconds_sum", "GET", rule])
        self.assertEqual(40, found["users_refusals_total", "token_missing", rule])
        directory = self.directory()
        assert directory is not None  # noqa: S101  # for mypy
        shares = [path.read_bytes() for path in directory.glob("counter_*.db")]
        self.assertEqual(2, sum(b"/users/<user_id>" in share for share in shares))

    def test_build(self) -> None:
        """The versions of the service and of Python are labels."""
        self.start()

        build = "users_build_info", platform.python_version(), VERSION
        self.assertEqual(1, self.metrics()[build])

    def test_processes(self) -> None:
        """Memory, CPU time and open files of each process are shown, until it ends."""
        self.start()
        killed, kept = self.service.workers()
        for process in (killed, kept):
            for name, lowest in (("resident_memory_bytes", 1e6), ("open_fds", 5), ("max_fds", 5)):
                self.wait_for(lowest, f"process_{name}", str(process), or_more=True)
            self.assertIn(("process_cpu_seconds_total", str(process)), self.metrics())
        self.service.kill_a_worker(killed)

        found = {key[1] for key in self.metrics() if key[0] == "process_open_fds"}
        self.assertIn(str(kept), found)
        self.assertNotIn(str(killed), found)

    def test_events(self) -> None:
        """Events are counted by kind and reason, and refusals by code and route."""
        self.start(LOGIN_FAILURES_PER_ACCOUNT="2", KNOWN_ADDRESS_DAYS="0")
        _, first, _ = self.service.register("ada")
        pair = first
        for _ in range(2):
            body = {"refresh_token": pair["refresh_token"]}
            _, pair, _ = self.service.request("POST", "/auth/refresh", body)
        self.service.request("POST", "/auth/refresh", {"refresh_token": first["refresh_token"]})
        self.service.login("ada")
        self.service.login("unknown")
        wrong = {"email": "ada@test.com", "password": "wrong"}
        for _ in range(5):
            self.service.request("POST", "/auth/login", wrong)

        found = self.metrics()

        events = {key[1:]: value for key, value in found.items() if key[0] == "users_events_total"}
        self.assertEqual(
            {
                ("registered", ""): 1,
                ("refreshed", ""): 2,
                ("refresh_reused", ""): 1,
                ("logged_in", ""): 1,
                ("login_refused", "unknown_email"): 1,
                ("login_refused", "wrong_password"): 2,
            },
            events,
        )
        self.assertEqual(3, found["users_refusals_total", "too_many_attempts", "/auth/login"])
        self.assertEqual(1, found["users_refusals_total", "refresh_reused", "/auth/refresh"])

    def test_hashes_and_connections(self) -> None:
        """Running, waiting and finished hashes and pooled connections are counted."""
        self.start(BCRYPT_LOG_ROUNDS="13", BCRYPT_THREADS="1")
        lines = [self.login() for _ in range(6)]
        self.wait_for(2, "users_hashes_waiting", or_more=True)
        self.wait_for(1, "users_hashes_running", or_more=True)
        for line in lines:
            with line:
                self.assertIn(b" 404 ", line.recv(100))

        self.wait_for(6, "users_hash_seconds_count")
        self.wait_for(0, "users_hashes_running")
        found = self.metrics()
        self.assertEqual(0, found["users_hashes_waiting",])
        self.assertGreater(found["users_hash_seconds_sum",], 0)
        for pool in ("read", "write"):
            self.assertEqual(0, found["users_pool_in_use", pool])
            self.assertEqual(32, found["users_pool_size", pool])

    @unittest.skipUnless(ON_POSTGRESQL, "needs a PostgreSQL server")
    def test_connections_that_break(self) -> None:
        """A connection counts as in use only while it is, even when connecting fails."""
        address = make_url(self.enterContext(scratch.database()))
        proxy = self.enterContext(PostgresProxy(address.host or "127.0.0.1", address.port or 5432))
        ours = address.set(host="127.0.0.1", port=proxy.port)
        self.start(ours.render_as_string(hide_password=False), RATE_LIMITS="0")
        self.service.register("ada")
        for _ in range(20):  # so that both processes have a connection
            self.service.login("unknown")
        proxy.freeze()
        with self.login() as line:
            self.wait_for(1, "users_pool_in_use", "read")
            proxy.thaw()
            self.assertIn(b" 404 ", line.recv(100))
        proxy.cut()
        answers = [self.service.login("ada")[0] for _ in range(4)]
        proxy.restore()
        self.wait_for(0, "users_pool_in_use", "read")
        self.wait_for(0, "users_pool_in_use", "write")

        self.assertEqual([503] * 4, answers)
        self.assertEqual(200, self.service.login("ada")[0])


class TestProcesses(MetricsTestCase):
    """Worker processes that are killed and replaced."""

    def test_killed(self) -> None:
        """A killed process keeps its counters, loses its gauges, and another one takes over."""
        self.start(BCRYPT_LOG_ROUNDS="15")
        before = self.service.workers()
        for _ in range(20):
            self.service.request("GET", "/ping")
        with self.login():
            self.wait_for(1, "users_hashes_running")
            for worker in before:
                self.service.kill_a_worker(worker)

        ping = ("users_http_requests_total", "GET", "/ping", "200")
        self.assertEqual(20, self.metrics()[ping])
        self.wait_for(0, "users_hashes_running")
        self.wait_for(32, "users_pool_size", "read")
        self.service.request("GET", "/ping")
        self.assertEqual(21, self.metrics()[ping])


class TestPort(MetricsTestCase):
    """METRICS_PORT."""

    def test_off(self) -> None:
        """Without METRICS_PORT no port is opened and nothing is counted."""
        self.service = self.enterContext(Service(self.enterContext(scratch.database())))

        self.assertIsNone(self.directory())
        self.assertEqual({self.service.port}, self.listening())

    def listening(self) -> set[int]:
        """Return the ports on which the processes of the server listen."""
        inodes = {
            str(file.readlink())
            for process in (self.service.process.pid, *self.service.workers())
            for file in Path(f"/proc/{process}/fd").glob("*")
            if file.is_symlink()
        }
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return {
            int(line[1].partition(":")[2], 16)
            for line in lines
            if line[3] == "0A" and f"socket:[{line[9]}]" in inodes
        }

    def test_taken(self) -> None:
        """A port that is in use is logged, and requests are answered."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = str(other.getsockname()[1])
            with Service(self.enterContext(scratch.database()), METRICS_PORT=port) as service:
                service.wait_for_output("metrics_port_unavailable")
                self.assertEqual(200, service.request("GET", "/ping")[0])
        # A process logs it once. When the first one stops, the other one may still try the port.
        self.assertLessEqual(service.log.count("metrics_port_unavailable"), 2)

    def test_command(self) -> None:
        """A command with the server's settings leaves the server's metrics alone."""
        url = self.enterContext(scratch.database())
        self.start(url)
        settings: dict[str, Any] = {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "SECRET_KEY": "0123456789abcdefghijklmnopqrstuvwxyz",
            "DATABASE_URL": url,
            "METRICS_PORT": str(self.port),
        }

        result = scratch.manage("purge", **settings)

        self.assertEqual((0, ""), (result.returncode, result.stderr))
        self.assertIn("users_pool_size", self.text())

    def test_old_directories(self) -> None:
        """A server removes the directory of an earlier one, but not while that one runs."""
        temporary = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.start(TMPDIR=str(temporary))
        old = self.directory()
        assert old is not None  # noqa: S101  # for mypy
        self.assertEqual((temporary, 0o700), (old.parent, old.stat().st_mode & 0o777))
        first = self.service
        self.start(TMPDIR=str(temporary))
        self.service.stop()
        self.assertTrue(old.exists())
        first.stop()
        self.assertTrue(old.exists())
        self.start(TMPDIR=str(temporary))

        self.assertFalse(old.exists())

    def test_same_port(self) -> None:
        """The service's own port is refused for metrics with one line."""
        settings = {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "SECRET_KEY": "0123456789abcdefghijklmnopqrstuvwxyz",
            "DATABASE_URL": self.enterContext(scratch.database()),
            "METRICS_PORT": "5000",
        }

        result = scratch.manage("serve", **settings)

        self.assertEqual(1, result.returncode)
        self.assertEqual("METRICS_PORT and GRANIAN_PORT are both 5000.\n", result.stderr)

    def test_own_directory(self) -> None:
        """A server always counts in a directory of its own."""
        self.start(PROMETHEUS_MULTIPROC_DIR=self.enterContext(tempfile.TemporaryDirectory()))

        self.assertEqual(32, self.metrics()["users_pool_size", "read"])

    def test_directory_that_is_removed(self) -> None:
        """A process whose directory was removed makes it again, and the service goes on."""
        self.start()
        directory = self.directory()
        assert directory is not None  # noqa: S101  # for mypy
        shutil.rmtree(directory)
        for worker in self.service.workers():
            self.service.kill_a_worker(worker)
        self.assertEqual(200, self.service.request("GET", "/ping")[0])
        self.wait_for(1, "users_http_requests_total", "GET", "/ping", "200")


class TestAnotherServer(MetricsTestCase):
    """A server other than `manage.py serve`, with a given directory."""

    def serve(self, directory: str) -> int:
        """Start the development server, and return its port; its output is in `log`."""
        url = self.enterContext(scratch.database())
        self.assertEqual(0, scratch.manage("db", "upgrade", DATABASE_URL=url).returncode)
        self.port, port = scratch.free_port(), scratch.free_port()
        self.log = self.enterContext(tempfile.NamedTemporaryFile("r"))
        with scratch.default_sigint():
            server = subprocess.Popen(
                [sys.executable, "manage.py", "runserver", "--port", str(port)],
                cwd=scratch.ROOT,
                env=scratch.settings(
                    DATABASE_URL=url,
                    SECRET_KEY="any",
                    METRICS_PORT=str(self.port),
                    PROMETHEUS_MULTIPROC_DIR=directory,
                ),
                stdout=self.log.fileno(),
                stderr=subprocess.STDOUT,
            )
        self.addCleanup(server.wait, 10)
        self.addCleanup(server.send_signal, signal.SIGINT)
        return port

    def test_no_directory(self) -> None:
        """Without a usable directory there are no metrics, and requests are answered."""
        port = self.serve("/dev/null/nowhere")
        self.ask(port, "GET", "/ping")

        self.assertIn("metrics_unavailable", Path(self.log.name).read_text())
        with self.assertRaises(ConnectionRefusedError):
            scratch.request(self.port, "GET", "/metrics")

    def test_development(self) -> None:
        """With the directory set, any server exposes metrics."""
        port = self.serve(self.enterContext(tempfile.TemporaryDirectory()))
        self.text()  # wait until the port is open
        user = {"username": "ada", "email": "ada@test.com", "password": "password"}
        self.ask(port, "GET", "/users/7")
        self.ask(port, "GET", "/nothing")
        self.ask(port, "POST", "/auth/register", user)

        found = self.metrics()
        answers = "users_http_requests_total"
        self.assertEqual(1, found[answers, "GET", "/users/<user_id>", "404"])
        self.assertEqual(1, found[answers, "GET", "none", "404"])
        self.assertEqual(1, found["users_refusals_total", "user_not_found", "/users/<user_id>"])
        self.assertEqual(1, found["users_events_total", "registered", ""])
        self.assertEqual(1, found["users_hash_seconds_count",])
        self.assertEqual(0, found["users_hashes_running",])
        self.assertEqual(0, found["users_pool_in_use", "write"])

    def ask(self, port: int, method: str, path: str, body: object = None) -> None:
        """Send a request, again and again until the server has started."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                scratch.request(port, method, path, body)
                return
            except ConnectionRefusedError:
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.05)
