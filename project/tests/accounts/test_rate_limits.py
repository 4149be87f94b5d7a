"""Rate limits: what is counted, for which account or address, and for how long."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar
from unittest import mock

from werkzeug.test import TestResponse

from project import create_app, db, errors
from project.accounts import rate_limits
from project.lib import database, hashing
from project.models import KnownAddress, Throttle
from project.tests.base import BaseTestCase, bearer
from project.tests.conformance import TESTING
from project.tests.rows import add_user

HOME, AWAY, ELSEWHERE = "192.0.2.1", "198.51.100.2", "203.0.113.3"
PAUSES = [60, 120, 240, 480, 900]  # seconds
DAY = 86_400


class LimitedTestCase(BaseTestCase):
    """A test with production's limits, and a user."""

    settings: ClassVar[dict[str, Any]] = {"RATE_LIMITS": True, "TOKEN_EXPIRATION_SECONDS": DAY}

    def setUp(self) -> None:
        """Add the user, and stop the clock."""
        super().setUp()
        rate_limits.init_app(self.app)
        self.move_clock(0)
        self.user = add_user("test", "test@test.com", "test")

    def send(
        self, path: str, body: object = None, *, ip: str = AWAY, token: str | None = None
    ) -> TestResponse:
        """Return the response to a POST from this address."""
        return self.app.test_client().post(
            path,
            json=body,
            headers=bearer(token) if token else {},
            environ_overrides={"REMOTE_ADDR": ip},
        )

    def log_in(
        self, password: str = "test", email: str = "test@test.com", ip: str = AWAY
    ) -> TestResponse:
        """Return the response to a login from this address."""
        return self.send("/auth/login", {"email": email, "password": password}, ip=ip)

    def guess(self, times: int, email: str = "test@test.com", ip: str = AWAY) -> None:
        """Log in with a wrong password this many times, none of which is refused by a limit."""
        for _ in range(times):
            self.assert_error(self.log_in("wrong", email, ip), errors.InvalidCredentials)

    def assert_paused(self, response: TestResponse, seconds: int) -> None:
        """Check that a response is TooManyAttempts with this Retry-After."""
        self.assert_error(response, errors.TooManyAttempts)
        self.assertEqual(str(seconds), response.headers["Retry-After"])

    def assert_logged_in(self, response: TestResponse) -> dict[str, Any]:
        """Check that a login succeeded, and return its tokens."""
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        tokens: dict[str, Any] = response.get_json()
        return tokens


class TestAccounts(LimitedTestCase):
    """Wrong passwords for one account."""

    def test_pause(self) -> None:
        """After ten failures the account pauses for a minute, for right passwords too."""
        for email in ("test@test.com", "nobody@test.com", "Test@Test.com"):
            with self.subTest(email):
                if email != "Test@Test.com":
                    self.guess(10, email)
                for password in ("test", "wrong", "x" * 2_000):
                    self.assert_paused(self.log_in(password, email), 60)
                self.assert_paused(self.log_in("test", email, ELSEWHERE), 60)

        self.move_clock(59.5)
        self.assert_paused(self.log_in(), 1)
        self.move_clock(0.5)
        self.assert_logged_in(self.log_in())

    def test_pauses_double(self) -> None:
        """Each further failure doubles the pause, up to 15 minutes."""
        self.guess(9)
        for pause in [*PAUSES, PAUSES[-1], PAUSES[-1]]:
            self.guess(1)
            self.assert_paused(self.log_in(), pause)
            self.move_clock(pause)

    def test_success_resets_the_account(self) -> None:
        """A login resets the account's failures; the address keeps its own."""
        for _ in range(3):
            self.guess(9)
            self.assert_logged_in(self.log_in())
        self.assertEqual([9], [count.attempts for count in counts()])

    def test_failures_expire_after_a_day(self) -> None:
        """Failures of the day before do not count."""
        self.guess(9)
        self.move_clock(DAY)
        self.guess(9)
        self.guess(1)
        self.assert_paused(self.log_in(), 60)

    def test_known_address(self) -> None:
        """Attackers elsewhere do not lock a user out from an address where they have logged in."""
        self.assert_logged_in(self.log_in(ip=HOME))
        self.guess(10)
        self.assert_paused(self.log_in(), 60)

        self.assert_logged_in(self.log_in(ip=HOME))
        self.assert_paused(self.log_in(), 60)
        self.guess(10, ip=HOME)
        self.assert_paused(self.log_in(ip=HOME), 60)
        self.assert_paused(self.log_in(ip=ELSEWHERE), 60)

    def test_known_address_expires(self) -> None:
        """An address is known for thirty days."""
        self.assert_logged_in(self.log_in(ip=HOME))
        self.move_clock(30 * DAY)
        self.guess(10)

        self.assert_paused(self.log_in(ip=HOME), 60)

    def test_password_change(self) -> None:
        """A wrong current password counts as a failed login; a right one does not."""
        token = self.assert_logged_in(self.log_in())["auth_token"]
        right = {"current_password": "test", "new_password": "test"}
        for _ in range(12):
            self.assertEqual(200, self.send("/auth/password", right, token=token).status_code)
        wrong = right | {"current_password": "wrong"}
        for _ in range(5):
            response = self.send("/auth/password", wrong, token=token, ip=ELSEWHERE)
            self.assert_error(response, errors.WrongPassword)
        self.guess(5, ip=ELSEWHERE)

        self.assert_paused(self.send("/auth/password", right, token=token, ip=ELSEWHERE), 60)
        self.assert_paused(self.log_in(ip=ELSEWHERE), 60)

    def test_restart(self) -> None:
        """Counts survive a restart and are shared by all processes."""
        self.guess(10)
        app = create_app(TESTING)
        app.config["RATE_LIMITS"] = True
        rate_limits.init_app(app)
        self.app, before = app, self.app

        self.assert_paused(self.log_in(), 60)
        with app.app_context():
            for engine in db.engines.values():
                engine.dispose()
        self.app = before

    def test_all_at_once(self) -> None:
        """Of two hundred guesses at once, ten reach the password check."""
        pool = hashing.HashingPool(threads=2, slots=200)
        self.app.extensions["hashing_pool"] = pool
        barrier = threading.Barrier(200)

        def guess(number: int) -> int:
            barrier.wait(20)
            return self.log_in(f"guess {number}").status_code

        with (
            mock.patch.object(pool, "run", side_effect=pool.run) as recorded,
            ThreadPoolExecutor(200) as threads,
        ):
            answers = list(threads.map(guess, range(200)))

        self.assertEqual(10, recorded.call_count)
        self.assertEqual((10, 190), (answers.count(404), answers.count(429)))

    def test_clocks_that_differ(self) -> None:
        """A count by a host whose clock is ahead does not pause the other hosts."""
        self.move_clock(5)
        self.guess(1)
        self.move_clock(-5)
        self.guess(1)
        self.assert_logged_in(self.log_in())

    def test_counts_hold_no_email(self) -> None:
        """The counts do not reveal which accounts were tried."""
        self.guess(2)
        self.guess(1, "nobody@test.com")
        self.assert_logged_in(self.log_in())

        stored = [tuple(row) for row in [*counts(), *known()]]
        self.assertNotIn("test.com", str(stored))


class TestAddresses(LimitedTestCase):
    """Failures from one address, whatever the accounts."""

    def fill(self, times: int, ip: str = AWAY) -> None:
        """Fail this many times, each at another account."""
        for number in range(times):
            self.guess(1, f"{number}@test.com", ip)

    def test_failures(self) -> None:
        """After a hundred failures an address pauses for 15 minutes, and no other address does."""
        self.fill(100)

        self.assert_paused(self.log_in(), 900)
        self.assert_logged_in(self.log_in(ip=ELSEWHERE))
        # Attempts during the pause do not count against the accounts.
        for _ in range(12):
            self.assert_paused(self.log_in("wrong", "other@test.com"), 900)
        self.guess(9, "other@test.com", ELSEWHERE)
        self.move_clock(900)
        self.assert_logged_in(self.log_in())
        self.fill(1)
        self.assert_paused(self.log_in(email="other@test.com"), 900)
        self.assert_logged_in(self.log_in())

    def test_failures_expire_after_an_hour(self) -> None:
        """The limit of a hundred failures is per hour."""
        self.fill(99)
        self.move_clock(3_600)
        self.fill(99)

    def test_success_is_not_counted(self) -> None:
        """Successful logins are not counted, and do not reset failures."""
        self.fill(99)
        for number in range(120):
            add_user(f"user{number}", f"user{number}@test.com", "test")
            self.assert_logged_in(self.log_in(email=f"user{number}@test.com"))
        self.fill(1)
        self.assert_paused(self.log_in(email="new@test.com"), 900)

    def test_networks(self) -> None:
        """IPv6 addresses of one /64 count together."""
        self.fill(50, "2001:db8:1:2::1")
        self.fill(50, "2001:db8:1:2:ffff::2")

        self.assert_paused(self.log_in(ip="2001:db8:1:2:3:4:5:6"), 900)
        self.assert_logged_in(self.log_in(ip="2001:db8:1:3::1"))

    def refresh(self, token: str, ip: str = AWAY) -> TestResponse:
        """Return the response to a refresh with this token from this address."""
        return self.send("/auth/refresh", {"refresh_token": token}, ip=ip)

    def test_forged_refresh_tokens(self) -> None:
        """They count as failures of their address, where genuine tokens are still accepted."""
        pair = self.assert_logged_in(self.log_in())
        for _ in range(100):
            self.assert_error(self.refresh("x"), errors.TokenInvalid)

        self.assert_paused(self.refresh("x"), 900)
        used = pair["refresh_token"]
        pair = self.assert_logged_in(self.refresh(used))
        repeated = self.assert_logged_in(self.refresh(used))
        self.assertEqual(pair, repeated)
        self.assert_paused(self.log_in(email="new@test.com"), 900)
        self.move_clock(self.app.config["REFRESH_REUSE_SECONDS"] + 1)
        self.assert_error(self.refresh(used), errors.RefreshReused)

    def test_refresh_tokens_of_ended_sessions(self) -> None:
        """They count as failures of their address; those that have only expired do not."""
        pair = self.assert_logged_in(self.log_in())
        self.send("/auth/logout", token=pair["auth_token"])
        for _ in range(100):
            self.assert_error(self.refresh(pair["refresh_token"]), errors.SessionEnded)
        self.assert_paused(self.refresh(pair["refresh_token"]), 900)

        self.move_clock(self.app.config["REFRESH_EXPIRATION_SECONDS"])
        for _ in range(101):
            self.assert_error(self.refresh(pair["refresh_token"]), errors.TokenExpired)

    def test_registrations(self) -> None:
        """An address may register twenty times an hour, counting refused registrations."""

        def register(number: int, ip: str = AWAY) -> TestResponse:
            name = f"user{number}"
            user = {"username": name, "email": f"{name}@test.com", "password": "test"}
            return self.send("/auth/register", user, ip=ip)

        for number in range(20):
            self.assertEqual(400 if number % 2 else 201, register(number // 2).status_code)

        self.assert_paused(register(99), 3_600)
        self.assertEqual(201, register(98, ELSEWHERE).status_code)
        self.move_clock(3_600)
        self.assertEqual(201, register(97).status_code)

    def test_changes_of_a_name(self) -> None:
        """A change of a name counts like a registration, but not without the password."""
        token = self.assert_logged_in(self.log_in())["auth_token"]

        def change(body: dict[str, str]) -> TestResponse:
            return self.app.test_client().patch(
                f"/users/{self.user.id}",
                json={"username": "renamed"} | body,
                headers=bearer(token),
                environ_overrides={"REMOTE_ADDR": AWAY},
            )

        for _ in range(21):
            self.assert_error(change({}), errors.InvalidPayload)
        for _ in range(20):
            self.assertEqual(200, change({"current_password": "test"}).status_code)
        self.assert_paused(change({"current_password": "test"}), 3_600)

    def test_purge(self) -> None:
        """Expired counts and addresses are deleted, and no others."""
        self.assert_logged_in(self.log_in(ip=HOME))
        self.guess(1)
        for seconds, deleted in ((0, 0), (3_600, 2), (30 * DAY, 2)):
            self.move_clock(seconds)
            self.assertEqual(deleted, rate_limits.delete_expired())
            db.session.commit()
        self.assertEqual(([], []), (counts(), known()))


class TestOff(BaseTestCase):
    """With rate limits off."""

    def test_testing(self) -> None:
        """Under test nothing is counted."""
        self.register()
        for _ in range(30):
            self.assert_error(self.login(password="wrong"), errors.InvalidCredentials)

        self.assertEqual(200, self.login().status_code)
        self.assertEqual([], counts())


def counts() -> list[Any]:
    """Return every count."""
    return list(database.fetch_all(db.select(Throttle.__table__)))


def known() -> list[Any]:
    """Return every known address."""
    return list(database.fetch_all(db.select(KnownAddress.__table__)))
