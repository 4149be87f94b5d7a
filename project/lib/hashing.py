"""The one door to bcrypt: check_new, hash, verify, needs_rehash, and the gate in front of them.

bcrypt reads 72 bytes and stops, some implementations at a NUL. Flask-Bcrypt's mode for long
passwords, which is on, feeds it the SHA-256 of the password in hexadecimal instead: 64 characters
that depend on every byte. A stored hash is therefore good for this service only.

Hashes that were made elsewhere are bcrypt over the password itself. They are stored with a mark in
front, so that neither kind is ever checked as the other; whoever logs in with one gets one of ours.

One hash costs a quarter of a second of a core. Two things keep that from everybody else: hashes
run on threads of their own at a lower priority, and the gate lets in only so many requests. It
stands before the body is read: clients that never finish one hold places, and nothing else.
"""

import contextlib
import os
import re
import threading
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar, cast

from bcrypt import checkpw
from flask import Flask, current_app

from project import metrics, password_rules
from project.bulkhead import Bulkhead
from project.extensions import bcrypt

P = ParamSpec("P")
T = TypeVar("T")

MAX_BYTES = 1_024
LONGEST_DECOMPOSED = 4  # characters that NFC makes one, at most
NICENESS = 5
MEASURED_ROUNDS = 10  # a cost that shows how fast a machine is, and takes no time to speak of
BCRYPT_BYTES = 72  # of a password that bcrypt looks at
# In front of a stored hash that was made elsewhere, as in RFC 2307: crypt(3), of the password.
FOREIGN = "{CRYPT}"
# In front of one of ours in a file, where the others have nothing; Django writes it like this too.
OURS = "bcrypt_sha256$"
# Of a hash from a file: what bcrypt can do, and some seconds of a core for each login tried.
MIN_COST, MAX_COST = 4, 16
# 16 bytes of salt and 23 of digest, whose last characters have bits to spare, which are zero.
_BCRYPT = re.compile(
    r"\$2[aby]\$(?P<cost>[0-9]{2})\$"
    r"[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{30}[.CGKOSWaeimquy26]"
)
# The salt and the digest of a hash that no password has.
_DUMMY = "abcdefghijklmnopqrstuu" + "." * 31


class Gate(Bulkhead):
    """Hashing threads, and the places of the requests that use them or wait for them."""

    def __init__(self, *, threads: int, places: int) -> None:
        super().__init__(places)
        self._executor = ThreadPoolExecutor(threads, "bcrypt", initializer=_lower_priority)

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns, called on a hashing thread in the order of asking."""
        function = metrics.of(current_app).hash(function)
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
    """Tell whether `password` has this hash; None, when there is no such user, takes as long.

    So does every hash of the configured cost or a lower one, whether the password is right or
    wrong. One of a higher cost takes longer, which nobody can hide who is not to pay it for every
    email that is made up: time tells whose hash is older than the day on which the cost was cut.
    """
    cost: int = current_app.config["BCRYPT_LOG_ROUNDS"]
    return _gate().run(_check, hashed, password, cost)


def _check(hashed: str | None, password: str, cost: int) -> bool:
    """Do what `verify` does, and the work of one hash of `cost` in all.

    bcrypt's work doubles with each step of the cost, so to bring a hash up to it takes one of each
    cost between: 2^c + (2^c + 2^(c+1) + ... + 2^(cost-1)) = 2^cost.
    """
    candidate = hashed or _dummy(cost)
    matches = _matches(candidate, password)
    for missing in range(_cost(candidate), cost):
        bcrypt.check_password_hash(_dummy(missing), "")
    return matches and hashed is not None


def _matches(hashed: str, password: str) -> bool:
    """Check a hash in the way it was made; one of either kind is one run of bcrypt.

    One made elsewhere is checked as its maker did: against the bytes that the client sent, which
    nobody normalized there either, and the first 72 of them. Makers differ on what follows a NUL,
    and nobody types one: that is a wrong password, as is one that is too long here.
    """
    normalized = normalize(password)
    if not is_foreign(hashed):
        return bool(bcrypt.check_password_hash(hashed, normalized))
    sent = password.encode()[:BCRYPT_BYTES]
    matches = checkpw(sent, hashed.removeprefix(FOREIGN).encode())
    return matches and b"\0" not in sent and len(normalized.encode()) <= MAX_BYTES


def needs_rehash(hashed: str) -> bool:
    """Tell whether `hashed` was made elsewhere, or at a lower cost than the configured one."""
    rounds: int = current_app.config["BCRYPT_LOG_ROUNDS"]
    return is_foreign(hashed) or _cost(hashed) < rounds


def _cost(hashed: str) -> int:
    return int(hashed.split("$")[2])


def _dummy(cost: int) -> str:
    return f"$2b${cost:02d}${_DUMMY}"


def is_foreign(hashed: str) -> bool:
    """Tell whether a stored hash was made elsewhere."""
    return hashed.startswith(FOREIGN)


def import_hash(text: str) -> str:
    """Return what is stored of a hash that stands in a file as `text`.

    Raises ValueError, whose message does not show it, for what is no bcrypt hash or costs more
    than MAX_COST.
    """
    hashed = text.removeprefix(OURS)
    found = _BCRYPT.fullmatch(hashed)
    if not found:
        raise ValueError("must be a bcrypt hash of the kind $2a$, $2b$ or $2y$")
    if not MIN_COST <= int(found["cost"]) <= MAX_COST:
        raise ValueError(f"must have a cost of {MIN_COST} to {MAX_COST}")
    return hashed if text.startswith(OURS) else FOREIGN + hashed


def export_hash(hashed: str) -> str:
    """Return what stands in a file for a stored hash, the very text that `import_hash` takes."""
    if is_foreign(hashed):
        return hashed.removeprefix(FOREIGN)
    return OURS + hashed


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
