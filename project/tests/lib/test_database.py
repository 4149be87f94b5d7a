"""The database: what requests cost it, and how its failures appear to clients."""

import os
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest import mock

import psycopg2
from sqlalchemy import event, func, make_url, select, text

from project import db, errors
from project.api import application
from project.lib import database, postgresql
from project.models import User
from project.tests import scratch
from project.tests.lib.cases import ProxiedDatabaseTestCase, ScratchTestCase
from project.tests.scratch import ON_POSTGRESQL


class TestProxiedDatabase(ProxiedDatabaseTestCase):
    """The statements of requests, and requests while the database fails."""

    def test_reading_requests_cost_one_statement(self) -> None:
        """Status, a user and a page of users are one prepared SELECT outside a transaction."""
        token = self.register()
        for path in ("/auth/status", "/users", "/users/1"):
            with self.subTest(path):
                statements = self.statements(partial(self.get, path, token))

                self.assertEqual(["EXECUTE"], [statement.split()[0] for statement in statements])

    def test_statements_of_a_login(self) -> None:
        """A login reads once, then writes twice in a transaction on a pre-pinged connection."""
        self.register()

        words = [statement.split()[0] for statement in self.statements(self.login)]

        self.assertEqual(["EXECUTE", "SELECT", "BEGIN", "EXECUTE", "EXECUTE", "COMMIT"], words)

    def test_prepared_statements_that_are_gone(self) -> None:
        """Prepared statements that a pooler or a migration invalidates are replaced unnoticed."""
        token = self.register()
        for name, statement in {
            "gone": "DEALLOCATE ALL",
            "altered": "ALTER TABLE users ALTER COLUMN username TYPE varchar(600)",
            "altered back": "ALTER TABLE users ALTER COLUMN username TYPE varchar(512)",
        }.items():
            with self.subTest(name):
                for engine in db.engines.values():
                    engine.dispose()
                expected = self.get("/auth/status", token).get_json()
                with db.engines[database.READ].connect() as connection:
                    connection.exec_driver_sql(statement)

                response = self.get("/auth/status", token)

                self.assertEqual(200, response.status_code)
                self.assertEqual(expected, response.get_json())
                plain = self.statements(partial(self.get, "/auth/status", token))
                self.assertEqual(["SELECT"], [statement.split()[0] for statement in plain])

    def test_prepared_writes_that_are_gone(self) -> None:
        """A login whose prepared statements are gone is repeated without, however long it took."""
        self.enterContext(
            mock.patch.object(postgresql.TimeLimitedConnection, "prepares_writes", True)
        )
        self.register()
        self.login()
        with db.engine.connect() as connection:
            connection.exec_driver_sql("DEALLOCATE ALL")
            connection.commit()

        with mock.patch.object(application, "REPEATED_WITHIN", 0):
            self.assertEqual(200, self.login().status_code)
        words = [statement.split()[0] for statement in self.statements(self.login)]
        self.assertEqual(["EXECUTE", "SELECT", "BEGIN", "INSERT", "INSERT", "COMMIT"], words)

    def test_statement_that_is_prepared_already(self) -> None:
        """A connection that already has the prepared statement can be used."""
        token = self.register()
        self.get("/auth/status", token)
        with db.engines[database.READ].connect() as connection:
            prepared: Any = connection.connection.dbapi_connection
            prepared.prepared.clear()

        self.assertEqual(200, self.get("/auth/status", token).status_code)

    def test_ping_costs_none(self) -> None:
        """Ping sends no statement."""
        self.assertEqual([], self.statements(lambda: self.get("/ping")))

    def test_database_away_and_back(self) -> None:
        """An unavailable database is a 503 at once, and a 200 as soon as it is back."""
        token = self.register()
        self.assertEqual(200, self.get("/auth/status", token).status_code)

        self.proxy.cut()
        self.assert_unavailable(self.get("/auth/status", token))
        self.assert_unavailable(self.login())
        self.assert_unavailable(self.add("meanwhile"))
        self.assert_unavailable(self.get("/users"))
        self.assertEqual(200, self.get("/ping").status_code)

        self.proxy.restore()
        self.assertEqual(200, self.get("/auth/status", token).status_code)
        self.assertEqual(201, self.add("meanwhile").status_code)

    def test_restart_between_two_requests_goes_unnoticed(self) -> None:
        """Connections that died in the pool fail no request."""
        token = self.register()
        self.proxy.cut()
        self.proxy.restore()

        self.assertEqual(200, self.get("/auth/status", token).status_code)
        self.proxy.cut()
        self.proxy.restore()
        self.assertEqual(201, self.add("after").status_code)

    def test_database_that_hangs(self) -> None:
        """A database that does not respond is a 503 in time, on old and new connections."""
        token = self.register()
        self.get("/auth/status", token)
        self.proxy.freeze()
        with (
            mock.patch.object(postgresql.TimeLimitedConnection, "answer_timeout", 0.1),
            mock.patch.multiple(postgresql, CONNECT_TIMEOUT=0.1, SUSPICION=0.05),
        ):
            for name in ("old", "new"):
                with self.subTest(name):
                    started = time.monotonic()
                    self.assert_unavailable(self.get("/auth/status", token))
                    self.assert_unavailable(self.add(name))
                    self.assertLess(time.monotonic() - started, 2)
            self.assertEqual(200, self.get("/ping").status_code)

        self.proxy.thaw()
        self.assertEqual(200, self.get("/auth/status", token).status_code)
        self.assertEqual(201, self.add("later").status_code)

    def test_database_known_to_hang(self) -> None:
        """While a database hangs, requests beyond half of GRANIAN_BLOCKING_THREADS fail at once."""
        token = self.register()
        places = self.app.config["GRANIAN_BLOCKING_THREADS"] // 2
        self.proxy.freeze()

        def seconds(_: object) -> float:
            started = time.monotonic()
            self.assert_unavailable(self.get("/auth/status", token))
            return time.monotonic() - started

        with (
            mock.patch.multiple(postgresql, CONNECT_TIMEOUT=1, SUSPICION=0.2),
            ThreadPoolExecutor(places) as threads,
        ):
            waiting = threads.map(seconds, range(places))
            time.sleep(0.5)
            late = [seconds(None) for _ in range(places)]

            self.assertGreater(min(waiting), 0.9)
            self.assertLess(max(late), 0.15, late)
        self.proxy.thaw()
        self.assertEqual(200, self.get("/auth/status", token).status_code)

    def test_hanging_database_holds_half_of_the_threads(self) -> None:
        """Half of the requests wait for a database that hangs; the others fail early."""
        token = self.register()
        places = self.app.config["GRANIAN_BLOCKING_THREADS"] // 2
        durations = []

        def ask() -> None:
            started = time.monotonic()
            self.assert_unavailable(self.get("/auth/status", token))
            durations.append(time.monotonic() - started)

        threads = [threading.Thread(target=ask) for _ in range(2 * places)]
        with (
            mock.patch.object(postgresql.TimeLimitedConnection, "answer_timeout", 1.5),
            mock.patch.object(postgresql, "SUSPICION", 0.1),
        ):
            self.proxy.freeze()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.proxy.thaw()

        self.assertEqual(places, sum(duration < 1 for duration in durations), durations)
        self.assertEqual(places, sum(1.4 < duration < 3 for duration in durations), durations)

    def test_slow_statements(self) -> None:
        """A request whose answers all take long is a 503 when they have used up its time."""
        scratch.execute(
            self.url,
            """CREATE FUNCTION delay() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN PERFORM pg_sleep(0.5); RETURN NEW; END $$;
            CREATE TRIGGER delay BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION delay();
            CREATE TRIGGER delay BEFORE INSERT ON sessions FOR EACH ROW EXECUTE FUNCTION delay();
            CREATE TRIGGER delay BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION delay()""",
        )
        self.assertEqual(201, self.add("early").status_code)
        started = time.monotonic()
        with mock.patch.multiple(postgresql, REQUEST_TIMEOUT=0.7, SUSPICION=0.1):
            self.assert_unavailable(self.add("late"))

        self.assertLess(time.monotonic() - started, 1.4)

    def test_waits_add_up_to_five_seconds(self) -> None:
        """A request waits for all slow answers, one more that is not slow, and a connection."""
        waits = postgresql.REQUEST_TIMEOUT, postgresql.SUSPICION, database.POOL_TIMEOUT
        self.assertLessEqual(sum(waits), 5)
        self.assertLess(postgresql.ANSWER_TIMEOUT, postgresql.REQUEST_TIMEOUT)
        self.assertEqual(postgresql.ANSWER_TIMEOUT, postgresql.TimeLimitedConnection.answer_timeout)
        for name in (None, database.READ):
            pool: Any = db.engines[name].pool
            self.assertEqual(self.app.config["GRANIAN_BLOCKING_THREADS"], pool.size())
            self.assertEqual(database.POOL_TIMEOUT, pool.timeout())
            self.assertEqual(0, pool._max_overflow)


class TestSeveralHosts(ProxiedDatabaseTestCase):
    """A database with two hosts: a proxy that can fail, and the server itself."""

    def reach(self, url: str) -> str:
        """Return a URL that names the proxy and the server, as libpq documents it."""
        self.direct = make_url(url)
        proxied = make_url(super().reach(url))
        self.place = f"{self.direct.host or '127.0.0.1'}:{self.direct.port or 5432}"
        hosts = f"127.0.0.1:{proxied.port},{self.place}"
        return url.replace(f"@{self.place}", f"@{hosts}")

    def setUp(self) -> None:
        """Connect to the first host in half a second at most."""
        self.enterContext(mock.patch.multiple(postgresql, CONNECT_TIMEOUT=0.4, SUSPICION=0.1))
        super().setUp()

    def servers(self) -> set[int]:
        """Return the ports that the pooled connections lead to."""
        ports = set()
        for name in (None, database.READ):
            with db.engines[name].connect() as connection:
                raw: Any = connection.connection.dbapi_connection
                ports.add(raw.info.port)
        return ports

    def test_first_host_comes_first(self) -> None:
        """Connections lead to the first host while it answers."""
        self.register()

        self.assertEqual({self.proxy.port}, self.servers())

    def test_host_that_hangs(self) -> None:
        """Connections move from a host that hangs to the next, and only the first one waits."""
        token = self.register()
        self.get("/auth/status", token)
        self.proxy.freeze()
        with mock.patch.object(postgresql.TimeLimitedConnection, "answer_timeout", 0.1):
            self.assert_unavailable(self.get("/auth/status", token))
            self.assertEqual(200, self.get("/auth/status", token).status_code)
            self.assertEqual(201, self.add("other").status_code)
        for engine in db.engines.values():
            engine.dispose()
        started = time.monotonic()
        with mock.patch.object(postgresql, "CONNECT_TIMEOUT", 20):
            self.assertEqual(200, self.get("/auth/status", token).status_code)
        self.assertLess(time.monotonic() - started, 8)
        self.assertNotIn(self.proxy.port, self.servers())

    def test_host_that_is_away(self) -> None:
        """Connections move from a host that refuses them to the next unnoticed."""
        token = self.register()
        self.proxy.cut()

        self.assertEqual(200, self.get("/auth/status", token).status_code)
        self.assertEqual(201, self.add("other").status_code)

    def test_standby(self) -> None:
        """A host that is a standby is left out."""
        self.register()
        self.proxy.is_standby = True
        for engine in db.engines.values():
            engine.dispose()

        self.assertEqual(201, self.add("other").status_code)
        self.assertNotIn(self.proxy.port, self.servers())

    def test_no_host_answers(self) -> None:
        """The error names each host with its reason, after one timeout for all of them."""
        hosts = {"host": "127.0.0.1,127.0.0.1", "port": f"{self.proxy.port},1"}
        factory = {"connection_factory": postgresql.TimeLimitedConnection}
        self.proxy.freeze()
        started = time.monotonic()
        with self.assertRaises(psycopg2.OperationalError) as caught:
            postgresql.Hosts(postgresql.WaitLimit(1)).connect(None, None, None, hosts | factory)

        self.assertLess(time.monotonic() - started, 1)
        self.assertEqual(
            f'connection to server at "127.0.0.1", port {self.proxy.port} failed:'
            " the database did not answer in time;"
            ' connection to server at "127.0.0.1", port 1 failed: Connection refused',
            str(caught.exception),
        )


@unittest.skipUnless(ON_POSTGRESQL, "SQLite has no schemas")
class TestOptions(ScratchTestCase):
    """Options that an operator sets in DATABASE_URL."""

    def reach(self, url: str) -> str:
        """Make a schema, and return a URL with options that lead to it."""
        scratch.execute(url, "CREATE SCHEMA app")
        return f"{url}?options=-csearch_path%3Dapp&application_name=one"

    def test_options(self) -> None:
        """The options hold on every connection, with those of the service."""
        token = self.register()

        self.assertEqual(200, self.get("/auth/status", token).status_code)
        self.assertEqual(200, self.get("/health/ready").status_code)
        for name, engine in db.engines.items():
            with self.subTest(name), engine.connect() as connection:
                query = "SELECT current_schema(), current_setting('application_name')"
                self.assertEqual(("app", "one"), tuple(connection.execute(text(query)).one()))
        with db.engines[database.READ].connect() as connection:
            seqscan = connection.execute(text("SHOW enable_seqscan")).scalar()
            self.assertEqual("off", seqscan)


@unittest.skipUnless(ON_POSTGRESQL, "SQLite cancels no transactions")
class TestCancelledTransactions(ScratchTestCase):
    """Transactions that PostgreSQL cancels, or whose connection it ends."""

    def cancel(self, attempts: int, action: str, when: str = "BEFORE INSERT ON users") -> None:
        """Let the next attempts to register execute `action` of PL/pgSQL in their transaction."""
        scratch.execute(
            self.url,
            f"""CREATE SEQUENCE attempts;
            CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN IF nextval('attempts') <= {attempts} THEN {action}; END IF; RETURN NEW; END $$;
            CREATE {"CONSTRAINT" if "DEFERRED" in when else ""} TRIGGER act {when}
            FOR EACH ROW EXECUTE FUNCTION act()""",
        )

    def attempts(self) -> int:
        """Return how many attempts to register there were."""
        with db.engines[database.READ].connect() as connection:
            return int(connection.execute(text("SELECT last_value FROM attempts")).scalar_one())

    def assert_repeated(self, action: str) -> None:
        """Check that a registration succeeds at the second attempt, and adds one user."""
        self.cancel(1, action)

        self.assertEqual(201, self.add("one").status_code)
        self.assertEqual(2, self.attempts())
        self.assertEqual(1, db.session.scalar(select(func.count()).select_from(User)))

    def test_serialization_failure(self) -> None:
        """A registration with a serialization failure is repeated."""
        self.assert_repeated("RAISE 'no' USING ERRCODE = '40001'")

    def test_deadlock(self) -> None:
        """A registration in a deadlock is repeated."""
        self.assert_repeated("RAISE 'no' USING ERRCODE = '40P01'")

    def test_connection_that_the_server_ends(self) -> None:
        """A registration whose connection the server ends is repeated on another one."""
        self.assert_repeated("PERFORM pg_terminate_backend(pg_backend_pid())")

    def test_repeated_once(self) -> None:
        """A registration that is cancelled twice is a 503."""
        self.cancel(2, "RAISE 'no' USING ERRCODE = '40P01'")

        self.assert_unavailable(self.add("late"))
        self.assertEqual(2, self.attempts())

    def test_error_of_a_commit(self) -> None:
        """A registration that fails in its COMMIT is a 503, and is not repeated."""
        failure = "RAISE 'no' USING ERRCODE = '40001'"
        self.cancel(1, failure, "AFTER INSERT ON users DEFERRABLE INITIALLY DEFERRED")

        self.assert_unavailable(self.add("late"))
        self.assertEqual(1, self.attempts())

    def test_reading_statement(self) -> None:
        """A reading statement that is cancelled is repeated once."""
        scratch.execute(
            self.url,
            """CREATE SEQUENCE attempts;
            CREATE FUNCTION read() RETURNS integer LANGUAGE plpgsql AS $$
            BEGIN IF nextval('attempts') = 1 THEN RAISE 'no' USING ERRCODE = '40001'; END IF;
            RETURN 7; END $$""",
        )

        self.assertEqual(7, database.count(text("SELECT read()")))
        self.assertEqual(2, self.attempts())


class TestUnwritableDatabase(ScratchTestCase):
    """Databases that refuse writes."""

    def test_full_database(self) -> None:
        """On a full disk writes are a 503 and reads succeed, until there is room again."""
        token = self.register()
        late = self.fill()

        self.assert_unavailable(self.add(late))
        self.assertEqual(200, self.get("/auth/status", token).status_code)

        self.make_room()
        self.assertEqual(201, self.add(late).status_code)

    def fill(self) -> str:
        """Fill the database; return a username for which there is no room."""
        if ON_POSTGRESQL:
            scratch.execute(
                self.url,
                """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN RAISE EXCEPTION 'no space left on device' USING ERRCODE = '53100'; END $$;
                CREATE TRIGGER full_disk BEFORE INSERT ON users
                FOR EACH ROW EXECUTE FUNCTION refuse()""",
            )
            return "late"
        self.pragma("max_page_count = 1")
        number = 0
        while self.add(f"{number:0100}").status_code == 201:
            number += 1
        return f"{number:0100}"

    def make_room(self) -> None:
        """Undo what `fill` did."""
        if ON_POSTGRESQL:
            scratch.execute(self.url, "DROP TRIGGER full_disk ON users")
        else:
            self.pragma("max_page_count = 100000")

    def test_read_only_database(self) -> None:
        """On a read-only database writes are a 503, until it is writable again."""
        token = self.register()
        self.make_read_only(True)

        self.assert_unavailable(self.add("late"))
        self.assertEqual(200, self.get("/auth/status", token).status_code)

        self.make_read_only(False)
        self.assertEqual(201, self.add("late").status_code)

    def make_read_only(self, read_only: bool) -> None:
        """Make new database sessions read-only, or writable again; open ones do not change."""
        if ON_POSTGRESQL:
            name = make_url(self.url).database
            setting = "on" if read_only else "off"
            scratch.execute(
                os.environ["DATABASE_TEST_URL"],
                f"ALTER DATABASE {name} SET default_transaction_read_only = {setting}",
            )
            if read_only:
                db.engine.dispose()
            return
        self.pragma(f"query_only = {int(read_only)}")

    def pragma(self, setting: str) -> None:
        """Change a setting of SQLite's connection for writes."""
        connection = db.engine.raw_connection()
        connection.cursor().execute(f"PRAGMA {setting}")
        connection.close()

    def test_invalid_statement(self) -> None:
        """An invalid statement is a 500, as a retry would not help."""
        with mock.patch(
            "project.accounts.directory._BY_ID", {False: text("SELECT nothing FROM users")}
        ):
            response = self.get("/users/1")

        expected = 500 if ON_POSTGRESQL else 503  # SQLite does not tell the two apart
        self.assertEqual(expected, response.status_code)
        self.assertNotIn("SELECT", response.get_data(as_text=True))


class TestConcurrency(ScratchTestCase):
    """Simultaneous requests, and transactions."""

    def setUp(self) -> None:
        """Make hash slots for all simultaneous requests."""
        with mock.patch.dict(os.environ, {"GRANIAN_BLOCKING_THREADS": "20"}):
            super().setUp()

    def test_equal_registrations_at_once_make_one_user(self) -> None:
        """Of ten simultaneous equal registrations, one succeeds and nine are refused."""
        barrier = threading.Barrier(10)
        statuses = []

        def register() -> None:
            client = self.app.test_client()
            user = {"username": "same", "email": "same@test.com", "password": "test"}
            barrier.wait(10)
            response = client.post("/auth/register", json=user)
            statuses.append((response.status_code, response.get_json()["message"]))

        threads = [threading.Thread(target=register) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        taken = (errors.UserExists.status, errors.UserExists.message)
        self.assertEqual([(201, "Successfully registered."), *[taken] * 9], sorted(statuses))
        self.assertEqual(1, db.session.scalar(select(func.count()).select_from(User)))

    def test_every_write_is_in_a_transaction(self) -> None:
        """A registration is one transaction, and a refused one is rolled back and recorded."""
        seen: list[str] = []
        event.listen(db.engine, "begin", lambda _connection: seen.append("begin"))
        event.listen(db.engine, "commit", lambda _connection: seen.append("commit"))

        self.assertEqual(201, self.add("one").status_code)
        self.assertEqual(400, self.add("one").status_code)

        refused = ["begin", "begin", "commit"]
        self.assertEqual(["begin", "commit", *refused], seen)
