"""Databases and server processes that live for one test."""

import contextlib
import http.client
import multiprocessing.context
import os
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import psycopg2
from sqlalchemy import make_url

from project.config import SECRETS, BaseConfig

ROOT = Path(__file__).resolve().parent.parent.parent
ON_POSTGRESQL = os.environ.get("DATABASE_TEST_URL", "").strip().startswith("postgres")
START_TIMEOUT = 60  # seconds
# Cheap hashes, short passwords, and no limit of registrations.
DEFAULTS = {
    "BCRYPT_LOG_ROUNDS": "4",
    "PASSWORD_MIN_LENGTH": "1",
    "REGISTRATIONS_PER_ADDRESS": "1000000",
}


@contextlib.contextmanager
def database(options: str = "") -> Iterator[str]:
    """Yield the URL of an empty database of the kind that the tests run on; drop it afterwards.

    `options` are those of CREATE DATABASE in PostgreSQL.
    """
    if not ON_POSTGRESQL:
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{folder}/scratch.db"
        return
    server = os.environ["DATABASE_TEST_URL"].strip()
    name = f"scratch_{secrets.token_hex(6)}"
    execute(server, f"CREATE DATABASE {name} {options}")
    try:
        url = make_url(server).set(database=name)
        yield url.render_as_string(hide_password=False)
    finally:
        execute(server, f"DROP DATABASE {name} WITH (FORCE)")


def execute(url: str, statement: str) -> None:
    """Run a statement on a PostgreSQL server, outside of any transaction."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = psycopg2.connect(plain)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
    finally:
        connection.close()


def manage(
    *arguments: str, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run manage.py with only these settings; an empty one counts as not set.

    A command spends most of its second on imports. So each command is forked from a process that
    has done the imports; apart from its speed, it behaves like a new process.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        for stream in streams:
            stream.write_text(stdin if stream.name == "stdin" else "")
        process = _forks().Process(
            target=_become_manage, args=(arguments, settings(**environment), streams)
        )
        process.start()
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["manage.py", *arguments], 60)
        code, output, errors = process.exitcode, streams[1].read_text(), streams[2].read_text()
    return subprocess.CompletedProcess(["manage.py", *arguments], code or 0, output, errors)


@cache
def _forks() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["manage"])
    return context


def _become_manage(
    arguments: Sequence[str], environment: Mapping[str, str], streams: Sequence[Path]
) -> None:
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, (stream, mode) in enumerate(zip(streams, "rww", strict=True)):
        with stream.open(mode) as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["manage.py", *arguments]
    runpy.run_path("manage.py", run_name="__main__")


def settings(**environment: str) -> dict[str, str]:
    """Return this process's environment, with these settings of the service and no others."""
    files = {f"{name}_FILE" for name in SECRETS}
    names = {"APP_SETTINGS", *SECRETS, *files, *BaseConfig.model_fields}
    others = {key: value for key, value in os.environ.items() if key not in names}
    return others | {"FLASK_SKIP_DOTENV": "1"} | environment


@contextlib.contextmanager
def default_sigint() -> Iterator[None]:
    """Let processes that start in this block react to SIGINT.

    A shell starts its background jobs with SIGINT ignored, and their processes inherit that.
    A signal for which this process has a handler has its default again in a new process.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def free_port() -> int:
    """Return a free port on 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def request(
    port: int, method: str, path: str, json: object = None, token: str | None = None
) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
    """Send a request on its own connection; return the status, the JSON and the headers."""
    headers = {"Content-Type": "application/json"} if json is not None else {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        body = orjson.dumps(json) if json is not None else None
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, orjson.loads(answer.read()), answer.headers
    finally:
        connection.close()


class Service:
    """`manage.py serve` with production's settings, on a free port of 127.0.0.1.

    Unless told otherwise it hashes cheaply and accepts any password. Use it as a context manager;
    `log` holds its output once it has stopped.
    """

    def __init__(self, database_url: str, **environment: str) -> None:
        self.port = free_port()
        self.log = ""
        self._output = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115  # `stop` closes it
        self._environment = settings(
            APP_SETTINGS="project.config.ProductionConfig",
            DATABASE_URL=database_url,
            GRANIAN_HOST="127.0.0.1",
            GRANIAN_PORT=str(self.port),
            **DEFAULTS | {"SECRET_KEY": secrets.token_hex(32)} | environment,
        )

    def __enter__(self) -> "Service":
        self.process = subprocess.Popen(
            [sys.executable, "manage.py", "serve"],
            cwd=ROOT,
            env=self._environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        self.wait_for_output("Started worker", times=2)  # a starting worker ignores SIGTERM
        return self

    def wait_for_output(self, text: str, times: int = 1) -> None:
        """Wait until the output contains a text this many times."""
        deadline = time.monotonic() + START_TIMEOUT
        while Path(self._output.name).read_text().count(text) < times:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the service did not print {text!r}:\n{self.log}")
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server and read its log; calling it again does nothing."""
        if self._output.closed:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log = Path(self._output.name).read_text()
        self._output.close()

    def request(
        self, method: str, path: str, json: object = None, token: str | None = None
    ) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
        """Send a request on its own connection; return the status, the JSON and the headers."""
        return request(self.port, method, path, json, token)

    def register(self, name: str) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
        """Return the response to a registration with this username."""
        user = {"username": name, "email": f"{name}@test.com", "password": "test"}
        return self.request("POST", "/auth/register", user)

    def login(self, name: str) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
        """Return the response to a login of this user."""
        credentials = {"email": f"{name}@test.com", "password": "test"}
        return self.request("POST", "/auth/login", credentials)

    def connect(self) -> socket.socket:
        """Return a raw connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def workers(self) -> list[int]:
        """Return the process IDs of the workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(child) for child in children.read_text().split()]

    def kill_a_worker(self, worker: int | None = None) -> None:
        """Send SIGKILL to a worker, and wait until the server has started another."""
        started = Path(self._output.name).read_text().count("Started worker")
        os.kill(worker or self.workers()[0], signal.SIGKILL)
        self.wait_for_output("Started worker", started + 1)
