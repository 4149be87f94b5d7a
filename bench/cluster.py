"""A Patroni cluster of three machines, with the configuration of deploy/patroni.

A machine is a network namespace: it has its own address, its processes are those in the namespace,
and its link can be set down. `isolate` starts a program where all this is private to it.
"""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg2

from bench.report import exit_on_sigterm
from bench.rolling import await_port
from bench.servers import ROOT

FILES = ROOT / "deploy" / "patroni"
NODES = ("node1", "node2", "node3")
PROXY = 5433  # the port of HAProxy in haproxy.cfg
PASSWORD = "loopback"  # of every user of the trial's databases
_HOSTS = "10.0.0.11:5432,10.0.0.12:5432,10.0.0.13:5432"
# DATABASE_URL for each way to find the primary.
URLS = {
    "haproxy": f"postgresql://users:{PASSWORD}@127.0.0.1:{PROXY}/users",
    "hosts": f"postgresql://users:{PASSWORD}@{_HOSTS}/users?target_session_attrs=read-write",
}
_FOLDER = "BENCH_FOLDER"


def isolate(module: str) -> Path:
    """Run `python -m module` again in namespaces of its own; return its folder for files there.

    The network is empty, other processes are invisible, and when the program exits, the kernel
    ends every process that it started. Needs root. Outside, this exits with the program's status.
    """
    os.environ["PATH"] += ":/usr/sbin"  # haproxy and ip
    if folder := os.environ.pop(_FOLDER, None):
        _run("mount -t tmpfs tmpfs /run")  # `ip netns` keeps its files there
        _run("ip link set lo up")
        _run("ip link add machines type bridge")
        _run("ip address add 10.0.0.1/24 dev machines")
        _run("ip link set machines up")
        return Path(folder)
    exit_on_sigterm()
    unshare = "unshare --net --mount --pid --fork --kill-child --mount-proc"
    # The shell is process 1, which has to reap the orphans of a machine that was killed.
    shell = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m", module, *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        program = subprocess.Popen([*unshare.split(), *shell], env={**os.environ, _FOLDER: folder})
        try:
            sys.exit(program.wait())
        finally:
            program.kill()
            program.wait()


def _run(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


class Machine:
    """One of the three machines, with etcd, Patroni and the PostgreSQL that Patroni starts."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.address = _ours("10.0.0.11", name)
        self._folder = folder
        _run(f"ip netns add {name}")
        _run(f"ip link add {name} type veth peer name eth0 netns {name}")
        _run(f"ip link set {name} master machines up")
        for command in (
            "link set lo up",
            f"address add {self.address}/24 dev eth0",
            "link set eth0 up",
        ):
            _run(f"ip -netns {name} {command}")
        for part in ("etcd", "data"):
            (folder / part).mkdir(parents=True, mode=0o700)
            shutil.chown(folder / part, "postgres")
        shutil.chown(folder, "postgres")

    def start(self) -> None:
        """Start etcd and Patroni."""
        self._start("etcd", "etcd", ETCD_DATA_DIR=str(self._folder / "etcd"))
        self._start(
            "patroni",
            f"patroni {self._folder.parent}/patroni.yml",
            PATRONI_POSTGRESQL_DATA_DIR=str(self._folder / "data"),
            PATRONI_POSTGRESQL_BIN_DIR=str(_binaries()),
            PATRONI_POSTGRESQL_PGPASS=str(self._folder / "pgpass"),
        )

    def _start(self, name: str, command: str, **changes: str) -> None:
        prefix = (
            f"ip netns exec {self.name} setpriv --reuid=postgres --regid=postgres --init-groups"
        )
        environment = {"PATH": os.environ["PATH"], **_settings(name, self.name)}
        with (self._folder / f"{name}.log").open("ab") as log:
            subprocess.Popen(
                f"{prefix} {command}".split(),
                cwd="/",
                env=environment | changes,
                stdout=log,
                stderr=log,
            )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process of the machine."""
        for pid in _run(f"ip netns pids {self.name}").split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), number)

    def plug(self, state: str) -> None:
        """Set its network link "down" or "up"."""
        _run(f"ip link set {self.name} {state}")

    def log(self) -> str:
        """Return the end of Patroni's log."""
        return (self._folder / "patroni.log").read_text()[-6000:]

    @contextmanager
    def connect(self, database: str = "postgres") -> Iterator[Any]:
        """Yield a cursor of a connection to its PostgreSQL, in autocommit."""
        connection = psycopg2.connect(
            host=self.address,
            user="postgres",
            password=PASSWORD,
            dbname=database,
            connect_timeout=2,
        )
        connection.autocommit = True
        with closing(connection), connection.cursor() as cursor:
            yield cursor

    def writes(self) -> bool:
        """Return whether its PostgreSQL acknowledges a commit; waits as long as that takes."""
        try:
            with self.connect() as cursor:
                cursor.execute("UPDATE trial SET number = number + 1")
        except psycopg2.Error:
            return False
        return True

    def patroni(self, path: str) -> Any:
        """Return the JSON of Patroni's REST API."""
        connection = http.client.HTTPConnection(self.address, 8008, timeout=2)
        try:
            connection.request("GET", path)
            return json.load(connection.getresponse())
        finally:
            connection.close()


def _ours(text: str, name: str) -> str:
    """Turn a setting of the first machine into that of another one; lists of all stay."""
    if "node3" in text or "10.0.0.13" in text:
        return text
    number = name.removeprefix("node")
    return text.replace("10.0.0.11", f"10.0.0.1{number}").replace("node1", name)


def _settings(part: str, name: str) -> dict[str, str]:
    """Return the variables of deploy/patroni for a machine, with the passwords filled in."""
    lines = (FILES / f"{part}.env").read_text().splitlines()
    pairs = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    return {key: _ours(value, name) or PASSWORD for key, value in pairs.items()}


def _binaries() -> Path:
    """Return the folder of PostgreSQL's programs."""
    return max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))


class Cluster:
    """The three machines."""

    def __init__(self, folder: Path) -> None:
        shutil.copy(FILES / "patroni.yml", folder)
        self.machines = {name: Machine(name, folder / name) for name in NODES}

    def roles(self) -> dict[str, str]:
        """Return the role of each machine that Patroni sees running, by name."""
        for machine in self.machines.values():
            with suppress(OSError, http.client.HTTPException, ValueError):
                return {
                    member["name"]: member["role"]
                    for member in machine.patroni("/cluster")["members"]
                    if member["state"] in {"running", "streaming"}
                }
        return {}

    def find(self, role: str) -> Machine:
        """Return the machine that has a role, "leader" or "sync_standby"."""
        return next(self.machines[name] for name, its in self.roles().items() if its == role)

    def await_whole(self, seconds: float = 120) -> None:
        """Return when both standbys receive from the leader, and one of them is synchronous."""
        deadline = time.monotonic() + seconds
        while not self._whole():
            if time.monotonic() > deadline:
                logs = "\n".join(machine.log() for machine in self.machines.values())
                raise RuntimeError(f"{logs}\nthe cluster is {self.roles()}")
            time.sleep(0.25)

    def _whole(self) -> bool:
        names = {role: name for name, role in self.roles().items()}
        if set(names) != {"leader", "replica", "sync_standby"}:
            return False
        with suppress(psycopg2.Error), self.machines[names["leader"]].connect() as cursor:
            cursor.execute("SELECT sync_state FROM pg_stat_replication WHERE state = 'streaming'")
            return sorted(state for (state,) in cursor) == ["async", "sync"]
        return False

    def create_database(self) -> None:
        """Create the database of the service, and the table of `Machine.writes`."""
        with self.find("leader").connect() as cursor:
            cursor.execute("SHOW max_connections")
            if cursor.fetchone() != ("200",):
                raise RuntimeError("PostgreSQL does not have the parameters of patroni.yml")
            cursor.execute(f"CREATE USER users PASSWORD '{PASSWORD}'")
            cursor.execute(f"CREATE USER alone SUPERUSER PASSWORD '{PASSWORD}'")
            cursor.execute("ALTER USER alone SET synchronous_commit = local")
            cursor.execute("CREATE DATABASE users OWNER users")
            cursor.execute("CREATE TABLE trial AS SELECT 0 AS number")


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Run a cluster with the database of the service, and HAProxy in front of it."""
    with ExitStack() as stack:
        cluster = Cluster(folder)
        for machine in cluster.machines.values():
            machine.start()
            stack.callback(machine.signal, signal.SIGKILL)
            stack.callback(machine.signal, signal.SIGCONT)
        cluster.await_whole()
        cluster.create_database()
        haproxy = subprocess.Popen(f"haproxy -f {FILES}/haproxy.cfg".split())
        stack.callback(haproxy.wait)
        stack.callback(haproxy.kill)
        await_port(haproxy, PROXY)
        yield cluster
