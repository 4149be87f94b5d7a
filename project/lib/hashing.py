"""Password hashing with bcrypt, and the pool that limits it: hash, verify, needs_rehash.

bcrypt reads only the first 72 bytes of a password, and some implementations stop at a NUL. So
Flask-Bcrypt's mode for long passwords is on: it passes the SHA-256 of the password in hexadecimal
to bcrypt, 64 characters that depend on every byte. Other programs cannot check such a hash.

Foreign hashes, made by other programs, are bcrypt over the password itself. They are stored with a
prefix, so that the two kinds are never confused. A login replaces a foreign hash (`needs_rehash`).

A hash takes a quarter of a second of a core. Two measures protect other requests: hashes run on
separate threads at a lower priority, and the pool limits the number of requests that hash. A
request reserves a slot when it has read its body, so a client that stalls holds none.
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

from project.extensions import bcrypt
from project.lib import metrics
from project.lib.app_state import AppState
from project.lib.bulkhead import Bulkhead

P = ParamSpec("P")
T = TypeVar("T")

MAX_BYTES = 1_024
MAX_NFC_RATIO = 4  # at most so many characters become one in NFC
NICENESS = 5
SLOT_TIMEOUT = 0.1  # seconds; `check_slot` holds a free slot for an instant
MEASURED_ROUNDS = 10  # the cost at which `seconds` measures: some hundredths of a second
BCRYPT_BYTES = 72  # the bytes of a password that bcrypt reads
# The prefix of a stored foreign hash: crypt(3) of the password, as in RFC 2307.
FOREIGN = "{CRYPT}"
# The prefix of a hash of this module in a file, where foreign hashes have none; Django has it too.
OURS = "bcrypt_sha256$"
# The costs accepted for a hash from a file: from bcrypt's minimum to seconds of CPU time per login.
MIN_COST, MAX_COST = 4, 16
# 16 bytes of salt and 23 of digest; the unused bits of their last characters are zero.
_BCRYPT = re.compile(
    r"\$2[aby]\$(?P<cost>[0-9]{2})\$"
    r"[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{30}[.CGKOSWaeimquy26]"
)
# The salt and the digest of a hash that no password matches.
_DUMMY = "abcdefghijklmnopqrstuu" + "." * 31


class HashingPool(Bulkhead):
    """Threads that hash, and slots for the requests that use them or wait for them."""

    def __init__(self, *, threads: int, slots: int) -> None:
        super().__init__(slots)
        self._executor = ThreadPoolExecutor(threads, "bcrypt", initializer=_lower_priority)

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` on a hashing thread, first come, first served, and return its result."""
        function = metrics.of(current_app).hash(function)
        return self._executor.submit(function, *args, **kwargs).result()


_pool = AppState[HashingPool]("hashing_pool")


def _lower_priority() -> None:
    """Lower the priority of the calling thread; only Linux has priorities of threads."""
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)


def init_app(app: Flask) -> None:
    """Bind bcrypt to `app` and create its pool.

    Unless BCRYPT_THREADS is set, a process has as many hashing threads as its share of the cores.
    The pool has GRANIAN_BLOCKING_THREADS slots.
    """
    bcrypt.init_app(app)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = app.config["BCRYPT_THREADS"] or max(1, (cores or 1) // app.config["GRANIAN_WORKERS"])
    slots = app.config["GRANIAN_BLOCKING_THREADS"]
    _pool.set(app, HashingPool(threads=threads, slots=slots))


def check_slot() -> None:
    """Raise Busy if no slot is free, before a request costs SQL or a read of its body."""
    _pool.get().enter()
    _pool.get().leave()


def reserve_slot() -> None:
    """Reserve a slot until this request ends; raises Busy if none is free for SLOT_TIMEOUT."""
    _pool.get().enter(SLOT_TIMEOUT)


def hash(password: str) -> str:  # noqa: A001  # callers write hashing.hash
    """Return the bcrypt hash of `password` at the configured cost."""
    rounds = current_app.config["BCRYPT_LOG_ROUNDS"]
    hashed = _pool.get().run(bcrypt.generate_password_hash, normalize(password), rounds)
    return cast(bytes, hashed).decode("ascii")


def verify(hashed: str | None, password: str) -> bool:
    """Return whether `password` has this hash.

    A hash of None, for an unknown account, takes the same time and returns False. So does every
    hash of the configured cost or a lower one, whether the password is right or wrong. A hash of a
    higher cost takes longer, because hiding that would mean paying the higher cost for every
    unknown account as well: the time reveals which hashes are older than the last cut of the cost.
    """
    cost: int = current_app.config["BCRYPT_LOG_ROUNDS"]
    return _pool.get().run(_check, hashed, password, cost)


def _check(hashed: str | None, password: str, cost: int) -> bool:
    """Do what `verify` does, with the work of one hash of `cost` in total.

    bcrypt's work doubles with each step of the cost. A hash of a lower cost c is followed by one
    dummy hash of each cost from c on: 2^c + (2^c + 2^(c+1) + ... + 2^(cost-1)) = 2^cost.
    """
    candidate = hashed or _dummy(cost)
    matches = _matches(candidate, password)
    for missing in range(_cost(candidate), cost):
        bcrypt.check_password_hash(_dummy(missing), "")
    return matches and hashed is not None


def _matches(hashed: str, password: str) -> bool:
    """Check a hash of either kind, with one run of bcrypt.

    A foreign hash is checked against the first 72 bytes as the client sent them, because other
    programs do not normalize. They differ in what they do after a NUL, which no keyboard types:
    such a password is wrong. So is one that is too long for this module.
    """
    normalized = normalize(password)
    if not is_foreign(hashed):
        return bool(bcrypt.check_password_hash(hashed, normalized))
    sent = password.encode()[:BCRYPT_BYTES]
    matches = checkpw(sent, hashed.removeprefix(FOREIGN).encode())
    return matches and b"\0" not in sent and len(normalized.encode()) <= MAX_BYTES


def needs_rehash(hashed: str) -> bool:
    """Return whether `hashed` is foreign, or has a lower cost than the configured one."""
    rounds: int = current_app.config["BCRYPT_LOG_ROUNDS"]
    return is_foreign(hashed) or _cost(hashed) < rounds


def _cost(hashed: str) -> int:
    return int(hashed.split("$")[2])


def _dummy(cost: int) -> str:
    return f"$2b${cost:02d}${_DUMMY}"


def is_foreign(hashed: str) -> bool:
    """Return whether a stored hash is foreign."""
    return hashed.startswith(FOREIGN)


def import_hash(text: str) -> str:
    """Return the hash to store for `text`, a hash from a file.

    Raises ValueError if it is not a bcrypt hash, or its cost is not between MIN_COST and MAX_COST.
    The message does not contain the hash.
    """
    hashed = text.removeprefix(OURS)
    found = _BCRYPT.fullmatch(hashed)
    if not found:
        raise ValueError("must be a bcrypt hash of the kind $2a$, $2b$ or $2y$")
    if not MIN_COST <= int(found["cost"]) <= MAX_COST:
        raise ValueError(f"must have a cost of {MIN_COST} to {MAX_COST}")
    return hashed if text.startswith(OURS) else FOREIGN + hashed


def export_hash(hashed: str) -> str:
    """Return the text of a stored hash in a file, which `import_hash` turns back into the hash."""
    if is_foreign(hashed):
        return hashed.removeprefix(FOREIGN)
    return OURS + hashed


def seconds(rounds: int) -> float:
    """Return the processor time that a hash of this cost takes on this machine, in seconds.

    It is measured at MEASURED_ROUNDS and doubled for each further step of the cost.
    """
    durations = []
    for _ in range(5):
        started = time.thread_time()
        bcrypt.generate_password_hash("password", MEASURED_ROUNDS)
        durations.append(time.thread_time() - started)
    return min(durations) * 2.0 ** (rounds - MEASURED_ROUNDS)


def normalize(password: str) -> str:
    """Return the NFC of `password`, so that it is the same on every keyboard (NIST SP 800-63B).

    A text so long that its NFC would exceed MAX_BYTES is returned as it is: no account has that
    password, and normalizing takes quadratic time.
    """
    if len(password) > MAX_NFC_RATIO * MAX_BYTES:
        return password
    return unicodedata.normalize("NFC", password)
