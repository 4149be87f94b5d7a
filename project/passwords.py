"""The one door to bcrypt: check_new, hash, verify, needs_rehash, and the gate in front of them.

bcrypt reads 72 bytes and stops, some implementations at a NUL. Flask-Bcrypt's mode for long
passwords, which is on, feeds it the SHA-256 of the password in hexadecimal instead: 64 characters
that depend on every byte. A stored hash is therefore good for this service only.

One hash costs a quarter of a second of a core. Two things keep that from everybody else: hashes
run on threads of their own at a lower priority, and the gate lets in only so many requests. It
stands before the body is read: clients that never finish one hold places, and nothing else.
"""

import contextlib
import os
import threading
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar, cast

from flask import Flask, current_app

from project import password_rules
from project.bulkhead import Bulkhead
from project.extensions import bcrypt

P = ParamSpec("P")
T = TypeVar("T")

MAX_BYTES = 1_024
LONGEST_DECOMPOSED = 4  # characters that NFC makes one, at most
NICENESS = 5
MEASURED_ROUNDS = 10  # a cost that shows how fast a machine is, and takes no time to speak of
# The salt and the digest of a hash that no password has.
_DUMMY = "abcdefghijklmnopqrstuu" + "." * 31


class Gate(Bulkhead):
    """Hashing threads, and the places of the requests that use them or wait for them."""

    def __init__(self, *, threads: int, places: int) -> None:
        super().__init__(places)
        self._executor = ThreadPoolExecutor(threads, "bcrypt", initializer=_lower_priority)

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns, called on a hashing thread in the order of asking."""
        return self._executor.submit(function, *args, **kwargs).result()


def _lower_priority() -> None:
    """Let the calling thread stand back; only Linux knows the priority of a single thread."""
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)


def init_app(app: Flask) -> None:
    """Bind bcrypt to `app` and give it a gate.

    As many hashes run at once as the process has cores to itself, and half of the server's
    threads are never in here.
    """
    bcrypt.init_app(app)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    app.extensions["password_gate"] = Gate(
        threads=app.config["BCRYPT_THREADS"]
        or max(1, (cores or 1) // app.config["GRANIAN_WORKERS"]),
        places=app.config["GRANIAN_BLOCKING_THREADS"] // 2,
    )


def _gate() -> Gate:
    return cast(Gate, current_app.extensions["password_gate"])


def take_turn() -> None:
    """Take a place at the gate until this request ends; raises Busy at once when it is full.

    A view that hashes names it first of its guards, as `requests.take_turn`, so that whoever is
    refused has cost no SQL and not even the reading of a body.
    """
    _gate().enter()


def check_new(password: str, username: str, email: str, *, field: str = "password") -> None:
    """Raise InvalidPayload for `field` unless this user may choose `password` from now on."""
    password_rules.check(
        normalize(password),
        min_length=current_app.config["PASSWORD_MIN_LENGTH"],
        username=username,
        email=email,
        field=field,
    )


def hash(password: str) -> str:  # noqa: A001  # it is only ever read as passwords.hash
    """Return the bcrypt hash of `password` at the configured cost."""
    rounds = current_app.config["BCRYPT_LOG_ROUNDS"]
    hashed = _gate().run(bcrypt.generate_password_hash, normalize(password), rounds)
    return cast(bytes, hashed).decode("ascii")


def verify(hashed: str | None, password: str) -> bool:
    """Tell whether `password` has this hash; None, when there is no such user, takes as long."""
    candidate = hashed or f"$2b${current_app.config['BCRYPT_LOG_ROUNDS']:02d}${_DUMMY}"
    matches = _gate().run(bcrypt.check_password_hash, candidate, normalize(password))
    return bool(matches) and hashed is not None


def needs_rehash(hashed: str) -> bool:
    """Tell whether `hashed` was made at a lower cost than the configured one."""
    rounds: int = current_app.config["BCRYPT_LOG_ROUNDS"]
    return int(hashed.split("$")[2]) < rounds


def seconds(rounds: int) -> float:
    """Return how long a hash of this cost takes on this machine, in seconds of a processor's time.

    High costs are not waited for: each is twice the one below it.
    """
    durations = []
    for _ in range(5):
        started = time.thread_time()
        bcrypt.generate_password_hash("password", MEASURED_ROUNDS)
        durations.append(time.thread_time() - started)
    return min(durations) * 2.0 ** (rounds - MEASURED_ROUNDS)


def normalize(password: str) -> str:
    """Return the NFC of `password`, so that it is the same on every keyboard (NIST SP 800-63B).

    What is longer than any password of MAX_BYTES could have been before is left as it is: it is
    nobody's, and normalizing takes the square of the length.
    """
    if len(password) > LONGEST_DECOMPOSED * MAX_BYTES:
        return password
    return unicodedata.normalize("NFC", password)
