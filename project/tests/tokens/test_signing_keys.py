"""The keys that sign auth tokens: the first one, rotation, what processes remember, encryption."""

import concurrent.futures
import multiprocessing
import os
import threading
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import flask_migrate
import jwt
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis.strategies import composite, integers, lists, none
from sqlalchemy import delete, event, insert, update
from sqlalchemy.exc import OperationalError, ProgrammingError

from project import clock, create_app, db, errors
from project.lib import database, encryption
from project.models import SigningKey
from project.tests.accounts.cases import CREDENTIALS, at_once
from project.tests.api.oauth_case import ISSUER
from project.tests.conformance import TESTING
from project.tests.lib.cases import ProxiedDatabaseTestCase
from project.tests.lib.log_capture import captured_output
from project.tests.rows import add_user, stored_sessions
from project.tests.scratch import ON_POSTGRESQL
from project.tests.scratch import database as scratch_database
from project.tests.tokens.cases import LIFETIME, SECRETS, IssuerTestCase, stored_keys
from project.tests.tokens.claims import claims_of, encode
from project.tokens import jwk, signing_keys

OTHER_KEYS = "another key." * 4
PUBLISHED_BEFORE = 900  # seconds
GRACE = 60  # seconds for which a process may sign with a key that has been replaced
UNKNOWN = f"{encode({'alg': 'ES256', 'typ': 'at+jwt', 'kid': 'unknown'})}.e30.AAAA"
START = datetime(2026, 1, 1, tzinfo=UTC)


def kid_of(token: str) -> str:
    """Return the kid in the header of a token."""
    return str(jwt.get_unverified_header(token)["kid"])


def row(kid: str, signs_from: int, verifies_until: int | None = None) -> Any:
    """Return the row of a key; the times are in seconds since START."""
    until = None if verifies_until is None else START + timedelta(seconds=verifies_until)
    return SimpleNamespace(
        kid=kid, signs_from=START + timedelta(seconds=signs_from), verifies_until=until
    )


@composite
def key_rows(draw: Callable[..., Any]) -> list[Any]:
    """Return rows of keys, in any state."""
    times = draw(lists(integers(-9, 9), max_size=6))
    return [row(str(n), time, draw(none() | integers(-9, 9))) for n, time in enumerate(times)]


class TestPure(unittest.TestCase):
    """Which keys sign and verify, from rows and the clock."""

    def signing(self, *rows: Any, at: float = 0) -> str | None:
        """Return the kid of the key that signs."""
        signer = signing_keys.signing(rows, START + timedelta(seconds=at))
        return signer and signer.kid

    def verifying(self, *rows: Any, at: float = 0) -> list[str]:
        """Return the kids of the keys that verify."""
        moment = START + timedelta(seconds=at)
        return [each.kid for each in signing_keys.verifying(rows, moment)]

    def test_signing(self) -> None:
        """The newest key that has begun signs, whatever the order of the rows."""
        old, new = row("old", -10, 20), row("new", 10)
        for rows in ((old, new), (new, old)):
            for at, expected in {
                0: "old",
                9.999999: "old",
                10: "new",
                20: "new",
                99: "new",
            }.items():
                self.assertEqual(expected, self.signing(*rows, at=at))

    def test_no_key(self) -> None:
        """Without a key that verifies, none signs."""
        self.assertIsNone(self.signing())
        self.assertIsNone(self.signing(row("retired", -10, 0)))

    def test_retired(self) -> None:
        """A key that verifies no longer does not sign, even if its successor has not begun."""
        self.assertEqual("new", self.signing(row("old", -10, 0), row("new", 10)))
        self.assertEqual("old", self.signing(row("old", -10, 1), row("new", 10)))

    def test_clock_behind(self) -> None:
        """If no key has begun, the one that begins first signs."""
        self.assertEqual("b", self.signing(row("a", 20), row("b", 10), row("c", 30)))

    def test_equal_times(self) -> None:
        """Of keys that begin at once, all processes choose the same."""
        for begin in (-1, 1):
            rows = [row(kid, begin) for kid in "abc"]
            self.assertEqual(self.signing(*rows), self.signing(*reversed(rows)))

    def test_verifying(self) -> None:
        """A key verifies before it signs, and until its end, exclusively."""
        rows = row("old", -10, 5), row("new", 10)

        self.assertEqual(["old", "new"], self.verifying(*rows))
        self.assertEqual(["old", "new"], self.verifying(*rows, at=4.999999))
        self.assertEqual(["new"], self.verifying(*rows, at=5))

    @settings(deadline=None)
    @given(key_rows(), integers(-10, 10))
    def test_the_key_that_signs_verifies(self, rows: list[Any], at: int) -> None:
        """The key that signs is one of those that verify, and there is one if any verifies."""
        verifying = self.verifying(*rows, at=at)

        self.assertEqual(bool(verifying), self.signing(*rows, at=at) in verifying)


class KeysTestCase(IssuerTestCase):
    """A test with the steps of an operator, and counts of statements."""

    def rotate(self, *, at_once: bool = False) -> str:
        """Rotate as the command does, and return the new kid."""
        kid = signing_keys.rotate(at_once=at_once)
        db.session.commit()
        return kid

    def signer(self, server: FlaskClient | None = None) -> str:
        """Return the kid of the key that signs on a server."""
        return kid_of(self.log_in(server)["auth_token"])

    @contextmanager
    def reads(self) -> Iterator[list[str]]:
        """Collect the statements with which this server reads the keys."""
        read: list[str] = []

        def collect(*arguments: Any) -> None:
            if "signing_keys" in arguments[2]:
                read.append(arguments[2])

        engine = db.engines[database.READ]
        event.listen(engine, "before_cursor_execute", collect)
        try:
            yield read
        finally:
            event.remove(engine, "before_cursor_execute", collect)


class TestFirstKey(KeysTestCase):
    """The first key, which the first process that needs one makes."""

    def test_none_before(self) -> None:
        """Nothing is stored before a key is needed."""
        self.client.get("/ping")
        self.assert_invalid(UNKNOWN)

        self.assertEqual([], stored_keys())

    def test_at_once(self) -> None:
        """Many requests at once make one key, and all tokens are good."""
        servers = [self.client, self.server(), self.server()]
        actions: list[Callable[[], Any]] = []
        for server in servers:
            actions += [partial(self.log_in, server)] * 4 + [partial(self.kids, server)] * 2
        answers = at_once(*actions)

        (stored,) = stored_keys()
        self.assertIsNone(stored["verifies_until"])
        self.assertEqual(clock.utcnow(), stored["signs_from"])
        for answer in answers:
            if isinstance(answer, list):
                self.assertEqual([stored["kid"]], answer)
            else:
                for server in servers:
                    self.accepted(self.status(answer["auth_token"], server))

    def test_published_first(self) -> None:
        """The key that is published first is the one that signs."""
        kids = self.kids()

        self.assertEqual(kids, [self.signer()])
        self.assertEqual(kids, [self.signer(self.server())])

    def test_rolled_back_login(self) -> None:
        """A login that is rolled back leaves no key, and the next login makes one."""
        failing = mock.patch("project.accounts.rate_limits.Attempt.succeed", side_effect=KeyError)
        with failing:
            self.assert_error(self.login(), errors.InternalError)
        self.assertEqual([], stored_keys())
        self.assertEqual([], stored_sessions())

        pair = self.log_in()

        (stored,) = stored_keys()
        self.assertEqual(stored["kid"], kid_of(pair["auth_token"]))
        self.accepted(self.status(pair["auth_token"]))
        self.accepted(self.status(pair["auth_token"], self.server()))

    def test_rotation_without_a_key(self) -> None:
        """A rotation before the first key makes one that signs at once, for want of another."""
        kid = self.rotate()

        self.assertEqual(kid, self.signer())


def _published_by_a_process(url: str, barrier: Any) -> list[str]:
    """Return the kids that a process of its own publishes, when all processes are ready."""
    variables = SECRETS | {"ISSUER": ISSUER, "DATABASE_TEST_URL": url}
    with mock.patch.dict(os.environ, variables):
        client = create_app(TESTING).test_client()
    barrier.wait(30)
    return [key["kid"] for key in client.get("/.well-known/jwks.json").get_json()["keys"]]


class TestProcesses(unittest.TestCase):
    """Processes that start together."""

    def test_first_key(self) -> None:
        """Several processes that need a key at once agree on one."""
        if not ON_POSTGRESQL:
            self.skipTest("SQLite has one writer")
        url = self.enterContext(scratch_database())
        variables = SECRETS | {"ISSUER": ISSUER, "DATABASE_TEST_URL": url}
        with mock.patch.dict(os.environ, variables):
            app = create_app(TESTING)
        with app.app_context():
            for engine in db.engines.values():
                self.addCleanup(engine.dispose)
            flask_migrate.upgrade()
            processes = multiprocessing.get_context("forkserver")
            with (
                processes.Manager() as manager,
                concurrent.futures.ProcessPoolExecutor(4, processes) as executor,
            ):
                barrier = manager.Barrier(4)
                runs = [executor.submit(_published_by_a_process, url, barrier) for _ in range(4)]
                published = [run.result(60) for run in runs]

            self.assertEqual([[key["kid"]] for key in stored_keys()] * 4, published)


class TestRotation(KeysTestCase):
    """Rotations, on two servers that serve requests all the time."""

    def setUp(self) -> None:
        """Start another server, make the first key, and let both servers read it."""
        super().setUp()
        self.servers = [self.client, self.server()]
        self.first = self.signer()
        for server in self.servers:
            self.assertEqual(self.first, self.signer(server))
        self.began = clock.utcnow()

    def move_to(self, seconds: float) -> None:
        """Set the clock to this many seconds after the first key was made."""
        self.move_clock((self.began - clock.utcnow()).total_seconds() + seconds)

    def assert_all(self, signer: str, *published: str) -> None:
        """Check which key signs on all servers and which ones they publish, in any order."""
        for server in self.servers:
            self.assertEqual(sorted({signer, *published}), sorted(self.kids(server)))
            self.assertEqual(signer, self.signer(server))

    def assert_good(self, *tokens: str) -> None:
        """Check that all servers accept the tokens."""
        for token in tokens:
            for server in self.servers:
                self.accepted(self.status(token, server))

    def test_walk(self) -> None:
        """A key is published at once, signs 15 minutes later, and its predecessor ends."""
        new = self.rotate()
        self.move_to(5)
        self.assert_all(self.first, new)

        self.move_to(PUBLISHED_BEFORE - 0.000001)
        self.assert_all(self.first, new)
        last = self.log_in(self.servers[1])["auth_token"]
        self.assertEqual(self.first, kid_of(last))

        self.move_to(PUBLISHED_BEFORE)
        self.assert_all(new, self.first)
        self.assert_good(last)

        self.move_to(PUBLISHED_BEFORE + LIFETIME - 1.5)
        self.assert_good(last)
        self.move_to(PUBLISHED_BEFORE + LIFETIME + GRACE - 0.000001)
        self.assert_all(new, self.first)
        self.move_to(PUBLISHED_BEFORE + LIFETIME + GRACE)
        self.assert_all(new)

    def test_no_reread_is_needed(self) -> None:
        """The new key signs on time on a server that has read the rows before."""
        new = self.rotate()
        self.move_to(PUBLISHED_BEFORE - 10)
        self.assertEqual(self.first, self.signer())
        self.move_to(PUBLISHED_BEFORE)

        with self.reads() as reads:
            self.assertEqual(new, self.signer())
        self.assertEqual([], reads)

    def test_token_of_a_late_server(self) -> None:
        """A server that has not read the new key signs with the old one; its tokens are good."""
        self.move_to(1)
        with mock.patch.object(signing_keys, "PUBLISHED_BEFORE", 0):
            new = self.rotate()
        self.move_to(GRACE - 1)
        late = self.log_in()["auth_token"]

        self.assertEqual(self.first, kid_of(late))
        self.assertEqual(new, self.signer(self.server()))
        self.assert_good(late)
        self.move_to(GRACE - 1 + LIFETIME - 1)
        self.assert_good(late)

    def test_token_of_a_client(self) -> None:
        """The old key verifies until the tokens of clients are over, if those live longer."""
        self.app.config["TOKEN_EXPIRATION_SECONDS"] = 10
        headers = self.add_client()
        self.rotate()
        self.move_to(PUBLISHED_BEFORE - 1)
        form = {"grant_type": "client_credentials"}
        answer = self.accepted(self.client.post("/oauth/token", data=form, headers=headers))
        self.assertEqual(self.first, kid_of(answer["access_token"]))

        self.move_to(PUBLISHED_BEFORE - 1 + answer["expires_in"] - 1)

        form = {"token": answer["access_token"]}
        answer = self.accepted(self.client.post("/oauth/introspect", data=form, headers=headers))
        self.assertTrue(answer["active"])

    def test_two_rotations(self) -> None:
        """After two rotations within 15 minutes each key signs in its turn, and none too long."""
        second = self.rotate()
        self.move_to(300)
        third = self.rotate()
        self.move_to(305)
        self.assert_all(self.first, second, third)

        self.move_to(PUBLISHED_BEFORE)
        self.assert_all(second, self.first, third)
        self.move_to(300 + PUBLISHED_BEFORE)
        self.assert_all(third, self.first, second)

        self.move_to(PUBLISHED_BEFORE + LIFETIME + GRACE)
        self.assert_all(third, second)
        self.move_to(300 + PUBLISHED_BEFORE + LIFETIME + GRACE)
        self.assert_all(third)

    def test_timeline(self) -> None:
        """Whatever two servers have read, one accepts what the other signs, while it is valid."""
        snapshots = [(0, signing_keys.all_keys())]
        for at in (100, 400, 1_500, 1_501, 6_000):
            self.move_to(at)
            self.rotate()
            snapshots.append((at, signing_keys.all_keys()))

        def known(at: int) -> Any:
            return [rows for since, rows in snapshots if since <= at][-1]

        for at in range(60, 9_000, 20):
            for age in (0, GRACE):
                moment = self.began + timedelta(seconds=at)
                signer: Any = signing_keys.signing(known(at - age), moment)
                if at > PUBLISHED_BEFORE:
                    earlier = {key.kid for key in known(at - PUBLISHED_BEFORE)}
                    self.assertIn(signer.kid, earlier)
                for later in (at, at + LIFETIME - 1):
                    for other_age in (0, GRACE):
                        moment = self.began + timedelta(seconds=later)
                        good = signing_keys.verifying(known(later - other_age), moment)
                        self.assertIn(signer.kid, {key.kid for key in good}, (at, age, later))

    def test_at_once(self) -> None:
        """A key that leaked is refused, the new one signs at once, and refresh tokens work."""
        leaked = self.log_in()
        new = self.rotate(at_once=True)
        self.move_to(GRACE)

        self.assert_all(new)
        for server in self.servers:
            self.assert_invalid(leaked["auth_token"], server)
        following = self.accepted(self.refresh(leaked))["auth_token"]
        self.assertEqual(new, kid_of(following))
        self.assert_good(following)

    def test_at_once_during_a_rotation(self) -> None:
        """A key that was published but did not sign yet is refused too."""
        pending = self.rotate()
        self.move_to(100)
        new = self.rotate(at_once=True)
        self.move_to(100 + GRACE)

        self.assert_all(new)
        self.move_to(PUBLISHED_BEFORE + 1)
        self.assert_all(new)
        self.assertNotIn(pending, self.kids())

    def test_rotation_after_one_at_once(self) -> None:
        """A later rotation revives no key."""
        new = self.rotate(at_once=True)
        self.move_to(10)
        newest = self.rotate()
        self.move_to(GRACE + 10)

        self.assert_all(new, newest)

    def test_refused_at_once(self) -> None:
        """The process that published the keys last refuses the leaked key after 5 seconds."""
        leaked = self.log_in()["auth_token"]
        new = self.rotate(at_once=True)
        self.move_to(5)
        self.assertEqual([new], self.kids())

        self.assert_invalid(leaked)

    def test_unknown_key(self) -> None:
        """A key that another server begins to use is read at once, if not just before."""
        one, other = self.servers
        self.kids(other)
        self.rotate(at_once=True)
        token = self.log_in(self.server())["auth_token"]

        self.move_to(4.999999)
        self.assert_invalid(token, other)
        self.move_to(5)
        self.accepted(self.status(token, other))
        self.accepted(self.status(token, one))

    def test_all_keys(self) -> None:
        """The newest key is first in the list."""
        second = self.rotate()
        self.move_to(1)
        third = self.rotate()

        listed = [each.kid for each in signing_keys.all_keys()]
        self.assertEqual([third, second, self.first], listed)


class TestReading(KeysTestCase):
    """How often a process reads the keys, and what it does when it cannot."""

    def setUp(self) -> None:
        """Make the first key, and read it."""
        super().setUp()
        self.token: str = self.log_in()["auth_token"]
        self.accepted(self.status(self.token))
        self.assertEqual([kid_of(self.token)], self.kids())

    def test_every_minute(self) -> None:
        """Requests read the keys at most every 60 seconds."""
        with self.reads() as reads:
            for _ in range(5):
                self.accepted(self.status(self.token))
                self.log_in()
            self.move_clock(59.999999)
            self.accepted(self.status(self.token))
            self.log_in()
            self.assertEqual(0, len(reads))

            self.move_clock(0.000001)
            for _ in range(5):
                self.accepted(self.status(self.token))
                self.log_in()
            self.assertEqual(1, len(reads))

    def test_published_keys(self) -> None:
        """The published keys are at most five seconds old, and read at most as often."""
        with self.reads() as reads:
            self.move_clock(4.999999)
            self.kids()
            self.assertEqual(0, len(reads))
            self.move_clock(0.000001)
            for _ in range(5):
                self.kids()
            self.assertEqual(1, len(reads))

    def test_unknown_kids(self) -> None:
        """10,000 tokens of unknown keys within five seconds cause one reread."""
        began = clock.utcnow() + timedelta(seconds=10)
        steps = (began + timedelta(seconds=n / 10_000) for n in range(50_000))
        with mock.patch("project.clock.utcnow", lambda: next(steps)), self.reads() as reads:
            for number in range(10_000):
                header = encode({"alg": "ES256", "typ": "at+jwt", "kid": f"unknown-{number}"})
                with self.assertRaises(errors.TokenInvalid):
                    signing_keys.verify(f"{header}.e30.AAAA")

        self.assertEqual(1, len(reads))
        self.assertLess(next(steps), began + timedelta(seconds=5))

    def test_unknown_kids_at_once(self) -> None:
        """Requests that come together cause one reread, and so do later ones every 5 seconds."""
        with self.reads() as reads:
            for seconds, expected in ((5, 1), (4.999999, 1), (0.000001, 2), (60, 3)):
                self.move_clock(seconds)
                at_once(*[partial(self.assert_invalid, UNKNOWN)] * 8)
                self.assertEqual(expected, len(reads))

    def test_reading_thread(self) -> None:
        """While a thread reads the keys, one with a known key goes on, one with a new key waits."""
        self.rotate(at_once=True)
        new = self.log_in(self.server())["auth_token"]
        self.move_clock(10)
        reading, proceed = threading.Event(), threading.Event()
        fetch_all = database.fetch_all

        def slowly(*arguments: Any, **parameters: Any) -> Any:
            reading.set()
            proceed.wait(10)
            return fetch_all(*arguments, **parameters)

        def verify(token: str) -> Any:
            with self.app.app_context():
                return signing_keys.verify(token)

        slow = mock.patch.object(database, "fetch_all", slowly)
        with slow, concurrent.futures.ThreadPoolExecutor(3) as threads:
            reader = threads.submit(verify, UNKNOWN)
            self.assertTrue(reading.wait(10))
            threads.submit(verify, self.token).result(10)
            waiting = threads.submit(verify, new)
            concurrent.futures.wait([waiting], timeout=0.2)
            proceed.set()
            self.assertEqual(claims_of(new), waiting.result(10))
            self.assertIsInstance(reader.exception(10), errors.TokenInvalid)

    def test_tokens_that_need_no_key(self) -> None:
        """Tokens that are refused for another reason cause no reread."""
        self.move_clock(10)
        plain = self.server(ISSUER="")
        others = [self.log_in(plain)["auth_token"], "x", "", "a.b.c", UNKNOWN + "A" * 5_000]
        header = {"alg": "ES256", "typ": "JWT", "kid": "unknown"}
        others += [f"{encode(header)}.e30.AAAA", f"{self.token[:-4]}AAAA"]
        with self.reads() as reads:
            for token in others:
                self.status(token)

        self.assertEqual([], reads)

    def test_clock_set_back(self) -> None:
        """When the clock is set back, the keys are read again, and sign and verify."""
        self.move_clock(-3_600)

        with self.reads() as reads:
            token = self.log_in()["auth_token"]
            self.accepted(self.status(token))
            self.assertEqual([kid_of(self.token)], self.kids())
        self.assertEqual(kid_of(self.token), kid_of(token))
        self.assertEqual(1, len(reads))
        self.assert_invalid(self.token)  # it is from the future
        self.assertEqual(1, len(stored_keys()))

    def test_unavailable_database(self) -> None:
        """Without the database, keys are known from memory; it is asked every five seconds."""
        unavailable = OperationalError("SELECT", {}, Exception("away"))
        failing = mock.patch.object(database, "fetch_all", side_effect=unavailable)
        kid = kid_of(self.token)
        self.move_clock(600)
        with failing as fetch_all:
            for _ in range(5):
                self.assertEqual([kid], self.kids())
                signing_keys.verify(self.token)
                with self.assertRaises(errors.TokenInvalid):
                    signing_keys.verify(UNKNOWN)
            self.assertEqual(1, fetch_all.call_count)
            self.move_clock(5)
            self.kids()
            self.assertEqual(2, fetch_all.call_count)
            self.move_clock(4)
            self.kids()
            self.assertEqual(2, fetch_all.call_count)

        new = self.rotate(at_once=True)
        self.move_clock(1)
        self.assertEqual([new], self.kids())

    def test_unavailable_at_first(self) -> None:
        """A process that has read no key answers 503 without the database, and 200 with it."""
        server = self.server()
        unavailable = OperationalError("SELECT", {}, Exception("away"))
        with mock.patch.object(database, "fetch_all", side_effect=unavailable):
            for _ in range(2):
                answer = server.get("/.well-known/jwks.json")
                self.assertEqual(503, answer.status_code)
                self.assert_error(self.status(self.token, server), errors.DatabaseUnavailable)

        self.assertEqual([kid_of(self.token)], self.kids(server))

    def test_fault(self) -> None:
        """Any other error of the database is not hidden."""
        self.move_clock(60)
        fault = ProgrammingError("SELECT", {}, Exception("no such table"))
        with mock.patch.object(database, "fetch_all", side_effect=fault):
            self.assertEqual(500, self.client.get("/.well-known/jwks.json").status_code)
        self.assertEqual([kid_of(self.token)], self.kids())

    def test_keys_that_are_gone(self) -> None:
        """When the table was emptied by hand, another key is made."""
        db.session.execute(delete(SigningKey))
        db.session.commit()
        self.move_clock(60)

        token = self.log_in()["auth_token"]

        self.assertNotEqual(kid_of(self.token), kid_of(token))
        self.accepted(self.status(token))
        self.assert_invalid(self.token)


class TestProxied(ProxiedDatabaseTestCase):
    """Keys while the database is away."""

    environment: ClassVar[dict[str, str]] = SECRETS | {"ISSUER": ISSUER}

    def test_away(self) -> None:
        """The published keys are served from memory; a login is a 503 until it is back."""
        add_user("test", "test@test.com", "test")
        self.assertEqual(200, self.login().status_code)
        before = self.client.get("/.well-known/jwks.json").get_json()
        self.move_clock(600)

        self.proxy.cut()
        for _ in range(3):
            response = self.client.get("/.well-known/jwks.json")
            self.assertEqual((200, before), (response.status_code, response.get_json()))
            self.assert_unavailable(self.login())

        self.proxy.restore()
        self.assertEqual(200, self.login().status_code)


class TestEncryption(KeysTestCase):
    """The private keys are encrypted under ENCRYPTION_KEYS."""

    def setUp(self) -> None:
        """Make the first key."""
        super().setUp()
        self.token: str = self.log_in()["auth_token"]
        self.kid, self.key = signing_keys.signing_key()

    def test_not_in_clear(self) -> None:
        """No column has the private key in any form."""
        number = self.key.private_numbers().private_value
        d = number.to_bytes(32)
        stored = str(stored_keys()) + str(stored_keys()[0]["private"].hex())

        self.assertNotIn(d, stored_keys()[0]["private"])
        jwk_d = jwt.algorithms.ECAlgorithm.to_jwk(self.key, as_dict=True)["d"]
        for clear in (d.hex(), str(number), str(jwk_d), "PRIVATE", '"d"', "'d'"):
            self.assertNotIn(clear, stored)
        self.assertNotIn("d", self.client.get("/.well-known/jwks.json").get_json()["keys"][0])

    def test_moved(self) -> None:
        """A private key that is copied to the row of another key is not used."""
        other = jwk.make()
        (stored,) = stored_keys()
        db.session.execute(
            insert(SigningKey).values(
                stored | {"kid": other.kid, "public": other.public, "signs_from": clock.utcnow()}
            )
        )
        db.session.execute(delete(SigningKey).where(SigningKey.kid == self.kid))
        db.session.commit()
        self.move_clock(60)

        self.assert_error(self.login(), errors.InternalError)
        (moved,) = signing_keys.all_keys()
        self.assertFalse(signing_keys.is_readable(moved, self.app.config["ENCRYPTION_KEYS"]))

    def test_wrong_key(self) -> None:
        """With other ENCRYPTION_KEYS nothing is signed or revealed; tokens are verified."""
        server = self.server(ENCRYPTION_KEYS=OTHER_KEYS)
        before = stored_sessions(), stored_keys()
        with captured_output() as written:
            response = server.post("/auth/login", json=CREDENTIALS)
        told = response.get_data(as_text=True) + written.getvalue()

        self.assert_error(response, errors.InternalError)
        self.assertIn("DecryptionFailed", written.getvalue())
        secrets = [OTHER_KEYS, *SECRETS.values(), stored_keys()[0]["private"].hex(), self.token]
        for secret in [*secrets, str(stored_keys()[0]["private"])]:
            self.assertNotIn(secret, told)
        self.assertEqual(before, (stored_sessions(), stored_keys()))
        self.accepted(self.status(self.token, server))
        self.assertEqual([self.kid], self.kids(server))

    def test_damaged(self) -> None:
        """A private key that was cut off is one that cannot be decrypted."""
        for rest in (b"", b"x", stored_keys()[0]["private"][:-1]):
            db.session.execute(update(SigningKey).values(private=rest))
            db.session.commit()
            with self.subTest(rest=len(rest)):
                (damaged,) = signing_keys.all_keys()
                self.assertFalse(
                    signing_keys.is_readable(damaged, self.app.config["ENCRYPTION_KEYS"])
                )
                self.assert_error(
                    self.server().post("/auth/login", json=CREDENTIALS), errors.InternalError
                )

    def test_replaced(self) -> None:
        """Under a new first key the old one decrypts; after a re-encryption it is not needed."""
        old, new = SECRETS["ENCRYPTION_KEYS"], OTHER_KEYS
        both = self.server(ENCRYPTION_KEYS=f"{new},{old}")
        self.assertEqual(self.kid, self.signer(both))
        with both.application.app_context():
            signing_keys.rotate()
            db.session.commit()
            self.assertEqual(1, signing_keys.reencrypt())
            db.session.commit()
            self.assertEqual(0, signing_keys.reencrypt())
            db.session.commit()

        only_new = self.server(ENCRYPTION_KEYS=new)
        self.assertEqual(self.kid, self.signer(only_new))
        self.accepted(self.status(self.log_in(only_new)["auth_token"]))
        self.accepted(self.status(self.token, only_new))
        refused = self.server().post("/auth/login", json=CREDENTIALS)
        self.assert_error(refused, errors.InternalError)
        self.move_clock(PUBLISHED_BEFORE)
        self.assertNotEqual(self.kid, self.signer(only_new))

    def test_reencryption_without_the_old_key(self) -> None:
        """A re-encryption that cannot decrypt a key fails and changes nothing."""
        self.rotate()
        before = stored_keys()
        with self.server(ENCRYPTION_KEYS=OTHER_KEYS).application.app_context():
            with self.assertRaises(encryption.DecryptionFailed):
                signing_keys.reencrypt()
            db.session.rollback()

        self.assertEqual(before, stored_keys())

    def test_readable(self) -> None:
        """It can be told which of the keys decrypt a private key."""
        (stored,) = signing_keys.all_keys()
        old = SECRETS["ENCRYPTION_KEYS"]
        for keys, expected in {
            (old,): True,
            (OTHER_KEYS, old): True,
            (OTHER_KEYS,): False,
            (): False,
        }.items():
            self.assertEqual(expected, signing_keys.is_readable(stored, keys))


class TestPurge(KeysTestCase):
    """Keys that verify no longer are deleted."""

    def delete_expired(self) -> int:
        """Delete the expired keys as `purge` does, and return how many."""
        deleted = signing_keys.delete_expired()
        db.session.commit()
        return deleted

    def test_retired(self) -> None:
        """A key is deleted when it verifies no longer, and not before."""
        first = self.signer()
        new = self.rotate()
        end = PUBLISHED_BEFORE + LIFETIME + GRACE
        self.move_clock(end - 0.000001)
        self.assertEqual(0, self.delete_expired())
        self.assertEqual({first, new}, {key["kid"] for key in stored_keys()})

        self.move_clock(0.000001)
        self.assertEqual(1, self.delete_expired())
        self.assertEqual(0, self.delete_expired())

        self.assertEqual([new], [key["kid"] for key in stored_keys()])
        self.assertEqual(new, self.signer())

    def test_last_key(self) -> None:
        """The key that signs is never deleted."""
        kid = self.signer()
        self.move_clock(10 * 365 * 86_400)

        self.assertEqual(0, self.delete_expired())
        self.assertEqual(kid, self.signer())
