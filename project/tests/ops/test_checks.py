"""manage.py check: what an operator is told before a configuration goes live."""

import os
import secrets
import socket
import tempfile
import unittest
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from sqlalchemy import make_url, text, update

from bench.mailserver import CREDENTIALS, PASSWORD, MailServer, certificate
from project import clock, create_app, db
from project.accounts import second_factor
from project.lib import hashing
from project.mail import outbox
from project.models import SigningKey, TotpFactor
from project.ops import checks
from project.ops.checks import Finding, Server, Verdict
from project.tests import scratch
from project.tests.lib.cases import ScratchTestCase
from project.tests.mail.servers import MAIL, needs_openssl
from project.tests.rows import add_user
from project.tests.scratch import ON_POSTGRESQL
from project.tokens import signing_keys

KEY, OTHER, ANOTHER = (secrets.token_hex(32) for _ in range(3))
PRODUCTION = {"APP_SETTINGS": "project.config.ProductionConfig", "SECRET_KEY": KEY}
ISSUER = {"ISSUER": "https://users.example", "ENCRYPTION_KEYS": OTHER}
# Good settings in every respect, except that they are for development.
DEVELOPMENT = {
    "APP_SETTINGS": "project.config.DevelopmentConfig",
    "SECRET_KEY": KEY,
    "BCRYPT_LOG_ROUNDS": "12",
    "PASSWORD_MIN_LENGTH": "15",
    "USERS_API_OPEN": "false",
    "API_DOCS": "false",
}
GOOD_SERVER = Server(
    skew=0.0,
    superuser=False,
    connections=97,
    pooled=False,
    address="192.0.2.1",
    encrypted=True,
    standby=False,
    read_only=False,
    encoding="UTF8",
)


class TestCommand(unittest.TestCase):
    """The command, run as an operator runs it."""

    def setUp(self) -> None:
        """Create an empty database."""
        self.url = self.enterContext(scratch.database())

    def check(self, code: int, **environment: str) -> list[str]:
        """Return the lines that the command prints, and check its exit code."""
        result = scratch.manage("check", **environment)
        self.assertEqual(code, result.returncode, result.stdout + result.stderr)
        self.assertEqual("", result.stderr)
        return result.stdout.splitlines()

    def wrong(self, lines: list[str]) -> list[str]:
        """Return what is wrong, and check that the last line counts it."""
        found = [line.removeprefix("wrong  ") for line in lines if line.startswith("wrong")]
        self.assertEqual(f"Wrong: {len(found)}." if found else "Nothing is wrong.", lines[-1])
        return found

    def test_good(self) -> None:
        """With a migrated database production's defaults exit with 0 and a line per finding."""
        settings = PRODUCTION | {"DATABASE_URL": self.url, "BCRYPT_LOG_ROUNDS": "10"}

        (missing,) = self.wrong(self.check(1, **settings))
        self.assertIn("python manage.py db upgrade", missing)
        if not ON_POSTGRESQL:
            self.assertFalse(Path(self.url.removeprefix("sqlite:///")).exists(), "to look made it")

        migrated = scratch.manage("db", "upgrade", **settings)
        self.assertEqual(0, migrated.returncode, migrated.stderr)
        lines = self.check(0, **settings)
        self.assertEqual([], self.wrong(lines))
        self.assertGreater(sum(line.startswith("ok  ") for line in lines), 7)
        for line in lines[:-2]:
            self.assertRegex(line, r"\A(ok|note) +[A-Z].*\.\Z")

    @unittest.skipUnless(ON_POSTGRESQL, "only PostgreSQL has encodings that are not Unicode")
    def test_encoding(self) -> None:
        """A database with another encoding than UTF8 is wrong, also if every migration has run."""
        url = self.enterContext(scratch.database("ENCODING SQL_ASCII TEMPLATE template0"))
        settings = PRODUCTION | {"DATABASE_URL": url, "BCRYPT_LOG_ROUNDS": "10"}
        migrated = scratch.manage("db", "upgrade", **settings)
        self.assertEqual(0, migrated.returncode, migrated.stderr)

        (line,) = self.wrong(self.check(1, **settings))

        self.assertIn("The encoding of the database is SQL_ASCII", line)

    def test_refused(self) -> None:
        """Settings with which the service would not start get a line each."""
        lines = self.check(
            1,
            APP_SETTINGS="project.config.ProductionConfig",
            SECRET_KEY="short-secret",
            SECRET_KEY_FALLBACKS="short-fallback",
            CORS_ORIGINS="*",
            BODY_TIMEOUT="soon",
            FORCE_HTTP="yes",
        )

        self.assertEqual(
            ["SECRET_KEY", "SECRET_KEY_FALLBACKS", "DATABASE_URL", "BODY_TIMEOUT", "CORS_ORIGINS"],
            [line.replace("=", " ").split()[0] for line in self.wrong(lines)],
        )
        for secret in ("short-secret", "short-fallback"):
            self.assertNotIn(secret, "".join(lines))
        self.assertEqual(1, sum("The variable FORCE_HTTP is not" in line for line in lines))

    def test_no_such_settings(self) -> None:
        """An unknown settings class is named."""
        (line,) = self.wrong(self.check(1, APP_SETTINGS="project.config.NoConfig"))

        self.assertEqual(
            "APP_SETTINGS='project.config.NoConfig': there is no such settings class", line
        )

    def test_development(self) -> None:
        """Settings for development are wrong in production."""
        settings = {"APP_SETTINGS": "project.config.DevelopmentConfig", "SECRET_KEY": "any"}

        lines = self.wrong(self.check(1, **settings, DATABASE_URL=self.url))

        for words in (
            "for development",
            "SECRET_KEY is shorter",
            "USERS_API_OPEN",
            "PASSWORD_MIN_LENGTH=1:",
            "BCRYPT_LOG_ROUNDS=4",
            "python manage.py db upgrade",
        ):
            self.assertEqual(1, sum(words in line for line in lines), words)

    def test_no_database(self) -> None:
        """An unavailable database is reported with the reason and without the password."""
        for url, reason in {
            "postgresql://user:sesame@127.0.0.1:1/users": '"127.0.0.1", port 1 failed: Conn',
            "postgresql://user:sesame@127.0.0.1:1,[::1]:2/users": '"::1", port 2 failed: ',
            "postgresql://user:open@sesame@127.0.0.1:1/users": "percent-encode",
            "sqlite:////nowhere/users.db": "/nowhere/users.db",
        }.items():
            with self.subTest(url):
                settings = PRODUCTION | {"BCRYPT_LOG_ROUNDS": "10", "DATABASE_URL": url}
                lines = self.check(1, **settings)

                (line,) = self.wrong(lines)
                self.assertIn(reason, line)
                self.assertNotIn("sesame", "".join(lines))


class FindingsTestCase(ScratchTestCase):
    """A test of the findings with some settings, on a database of its own."""

    def findings(self, settings: dict[str, str]) -> list[Finding]:
        """Return the findings with these settings, on the database of the test."""
        environment = scratch.settings(DATABASE_URL=self.url) | settings
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.object(hashing, "seconds", return_value=0.3),
        ):
            app = create_app()
            with app.app_context():
                try:
                    return list(checks.examine(app))
                finally:
                    for engine in db.engines.values():
                        engine.dispose()

    def assert_found(
        self, settings: dict[str, str], words: str, verdict: Verdict = Verdict.WRONG
    ) -> str:
        """Check that one finding has these words and this verdict, and no other is wrong.

        Return all findings.
        """
        found = self.findings(settings)
        lines = [str(finding) for finding in found]
        matching = [finding for finding in found if words in finding.text]
        self.assertEqual([verdict], [finding.verdict for finding in matching], lines)
        others = [finding for finding in found if finding not in matching]
        expected = {"These settings are for development"} if "Dev" in str(settings) else set()
        wrong = [finding.text for finding in others if finding.verdict is Verdict.WRONG]
        self.assertEqual(expected, {text.partition(".")[0] for text in wrong}, lines)
        return "\n".join(lines)


class TestMisspelled(FindingsTestCase):
    """Variables that are named almost like a setting."""

    def test_settings(self) -> None:
        """Each is noted with the setting of the nearest name, and without its value."""
        for name, setting in {
            "FORCE_HTTP": "FORCE_HTTPS",
            "force_https": "FORCE_HTTPS",
            "DATABASE_URI": "DATABASE_URL",
            "ENCRYPTION_KEY": "ENCRYPTION_KEYS",
            "SECRET_KEY_FALLBACK_FILE": "SECRET_KEY_FALLBACKS_FILE",
            "TRUSTED_PROXY": "TRUSTED_PROXIES",
            "BCRYPT_ROUNDS": "BCRYPT_LOG_ROUNDS",
            "GRANIAN_PROT": "GRANIAN_PORT",
        }.items():
            with self.subTest(name):
                (found,) = checks.misspelled({name: "sesame"})

                expected = f"The variable {name} is not a setting, and changes nothing."
                self.assertEqual(checks.note(f"{expected} {setting} is one."), found)

    def test_others(self) -> None:
        """Settings, Granian's variables and those of other programs are not noted."""
        names = """
            SECRET_KEY SECRET_KEY_FILE DATABASE_TEST_URL APP_SETTINGS GRANIAN_WORKERS_LIFETIME
            GRANIAN_RUNTIME_BLOCKING_THREADS GRANIAN_SSL_CERTIFICATE
            PATH HOME USER MAIL LANG TERM PWD HOSTNAME HTTP_PROXY HTTPS_PROXY https_proxy no_proxy
            SSL_CERT_FILE PGHOST PGPORT PGUSER PGPASSWORD PGPASSFILE PGSSLMODE POSTGRES_PASSWORD
            PYTHONPATH PYTHON_VERSION VIRTUAL_ENV FLASK_APP FLASK_DEBUG WEB_CONCURRENCY PORT
            KUBERNETES_SERVICE_HOST USERS_SERVICE_PORT METRICS_SERVICE_PORT SMTP_PORT
            CREDENTIALS_DIRECTORY INVOCATION_ID NOTIFY_SOCKET LISTEN_FDS CI GITHUB_TOKEN
            OTEL_SERVICE_NAME OTEL_LOG_LEVEL SENTRY_DSN PROMETHEUS_MULTIPROC_DIR
            AWS_SECRET_ACCESS_KEY AZURE_CLIENT_SECRET CLIENT_SECRET REDIS_URL COMPOSE_FILE
        """

        self.assertEqual([], list(checks.misspelled(names.split())))

    def test_command(self) -> None:
        """The check notes them."""
        self.assert_found(PRODUCTION | {"FORCE_HTTP": "1"}, "The variable FORCE_HTTP", Verdict.NOTE)


class TestFindings(FindingsTestCase):
    """Each finding by itself."""

    def test_production(self) -> None:
        """Nothing is wrong with production's defaults."""
        found = self.findings(PRODUCTION)

        self.assertNotIn(Verdict.WRONG, {finding.verdict for finding in found})

    def test_purpose(self) -> None:
        """Settings for development are reported, however secure they are."""
        found = self.findings(DEVELOPMENT)

        wrong = [finding.text for finding in found if finding.verdict is Verdict.WRONG]
        self.assertEqual(1, len(wrong), wrong)
        self.assertIn("for development", wrong[0])

    def test_weak_keys(self) -> None:
        """A short or well-known key is wrong, in SECRET_KEY_FALLBACKS too, and no key is shown."""
        for settings, words in (
            ({"SECRET_KEY": "short"}, "SECRET_KEY is shorter"),
            ({"SECRET_KEY": "my_precious" * 4}, "SECRET_KEY is a well-known"),
            ({"SECRET_KEY_FALLBACKS": f"{OTHER},short"}, "number 2 of SECRET_KEY_FALLBACKS"),
        ):
            with self.subTest(words):
                self.assert_found(DEVELOPMENT | settings, words)
                texts = "".join(str(finding) for finding in self.findings(DEVELOPMENT | settings))
                for secret in (KEY, OTHER, "my_precious"):
                    self.assertNotIn(secret, texts)

    def test_rotation(self) -> None:
        """Old keys are noted with the time until they can be removed, and a comma in the key."""
        for settings, words in (
            ({"SECRET_KEY_FALLBACKS": OTHER}, "token has expired, 30 days after"),
            (
                {"SECRET_KEY_FALLBACKS": OTHER, "REFRESH_EXPIRATION_SECONDS": "5184000"},
                "token has expired, 60 days after",
            ),
            ({"SECRET_KEY": f"{KEY},{OTHER}"}, "SECRET_KEY contains a comma"),
        ):
            with self.subTest(words):
                self.assert_found(PRODUCTION | settings, words, Verdict.NOTE)

    def test_open_settings(self) -> None:
        """Settings that open the service to attackers are wrong."""
        for base, settings, words in (
            (PRODUCTION, {"USERS_API_OPEN": "true"}, "USERS_API_OPEN"),
            (PRODUCTION, {"RATE_LIMITS": "false"}, "RATE_LIMITS"),
            (PRODUCTION, {"PASSWORD_MIN_LENGTH": "7"}, "PASSWORD_MIN_LENGTH=7"),
            (DEVELOPMENT, {"CORS_ORIGINS": "*"}, "CORS_ORIGINS"),
        ):
            with self.subTest(words):
                self.assert_found(base | settings, words)

    def test_metrics(self) -> None:
        """A metrics port is noted, and is wrong when it is the port of the service."""
        both = {"METRICS_PORT": "9100", "GRANIAN_PORT": "9100"}
        self.assert_found(PRODUCTION | both, "is the port of the service itself")
        self.assert_found(PRODUCTION | {"METRICS_PORT": "9100"}, "METRICS_PORT=9100", Verdict.NOTE)

    def test_documentation(self) -> None:
        """A public API document is wrong."""
        for shown, verdict in ((True, Verdict.WRONG), (False, Verdict.OK)):
            with self.subTest(shown=shown):
                self.app.config["API_DOCS"] = shown
                found = [
                    finding.verdict
                    for finding in checks.examine(self.app)
                    if "documentation" in finding.text
                ]

                self.assertEqual([verdict], found)

    def test_https(self) -> None:
        """FORCE_HTTPS that would refuse every request is wrong; without it there is a note."""
        forced = {"FORCE_HTTPS": "true"}
        certificate = {"GRANIAN_SSL_CERTIFICATE": "/certificate.pem"}
        self.assert_found(PRODUCTION | forced, "every request will be refused")
        self.assert_found(PRODUCTION, "FORCE_HTTPS is off", Verdict.NOTE)
        for settings in (forced | {"TRUSTED_PROXIES": "1"}, forced | certificate):
            with self.subTest(settings):
                self.assert_found(PRODUCTION | settings, "not arrive over HTTPS", Verdict.OK)

    def test_short_passwords(self) -> None:
        """A minimum of 8 to 14 characters is a note, and 15 is good."""
        for length, verdict in (("8", Verdict.NOTE), ("14", Verdict.NOTE), ("15", Verdict.OK)):
            with self.subTest(length):
                settings = PRODUCTION | {"PASSWORD_MIN_LENGTH": length}
                self.assert_found(settings, f"PASSWORD_MIN_LENGTH={length}:", verdict)

    def test_migrations(self) -> None:
        """Missing migrations are wrong; newer ones are a note."""
        for revision, words, verdict in (
            ("0002", "Migrations are missing", Verdict.WRONG),
            ("9999", "A newer version", Verdict.NOTE),
        ):
            with self.subTest(revision):
                self.set_revision(revision)
                self.assert_found(PRODUCTION, words, verdict)
        with db.engine.begin() as connection:
            connection.execute(text("ALTER TABLE throttles RENAME TO other_table"))
        self.assert_found(PRODUCTION, "another program's")

    def set_revision(self, revision: str) -> None:
        """Set the revision that the database says it has."""
        statement = text("UPDATE alembic_version SET version_num = :revision")
        with db.engine.begin() as connection:
            connection.execute(statement, {"revision": revision})

    def test_clock(self) -> None:
        """A clock that differs from the database's is wrong in both directions."""
        if not ON_POSTGRESQL:
            self.assert_found(PRODUCTION, "There is one clock", Verdict.OK)
            return
        self.assert_found(PRODUCTION, "clocks", Verdict.OK)
        now = clock.utcnow
        for seconds, words in ((-3, "s behind the"), (3, "s ahead of the")):
            skewed = partial(lambda seconds: now() + timedelta(seconds=seconds), seconds)
            with self.subTest(words), mock.patch("project.clock.utcnow", skewed):
                self.assert_found(PRODUCTION, words)

    @unittest.skipIf(ON_POSTGRESQL, "is about SQLite")
    def test_sqlite(self) -> None:
        """An SQLite database is a note: it belongs to one machine."""
        self.assert_found(PRODUCTION, "SQLite file", Verdict.NOTE)

    def test_embedded(self) -> None:
        """The embedded database is wrong."""
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch("project.config.INSTANCE", Path(folder)),
        ):
            self.assert_found(DEVELOPMENT | {"DATABASE_URL": ""}, "DATABASE_URL is not set")

    @unittest.skipUnless(ON_POSTGRESQL, "needs a PostgreSQL server")
    def test_connections(self) -> None:
        """More connections than PostgreSQL, the database or the role allows are wrong."""
        self.assert_found(PRODUCTION | {"GRANIAN_WORKERS": "256"}, "may open 8448: 256 processes")

        scratch.execute(
            self.url, f"ALTER DATABASE {make_url(self.url).database} CONNECTION LIMIT 65"
        )
        self.assert_found(PRODUCTION, "allows this role 65 connections, and a server may")
        self.assert_found(PRODUCTION | {"GRANIAN_WORKERS": "1"}, "opens at most 33", Verdict.OK)


class TestIssuer(FindingsTestCase):
    """Findings about tokens that other services verify."""

    environment: ClassVar = ISSUER

    def assert_found(
        self, settings: dict[str, str], words: str, verdict: Verdict = Verdict.WRONG
    ) -> str:
        """Check and return the findings, and check that no secret is in them."""
        texts = super().assert_found(settings, words, verdict)
        for secret in (KEY, OTHER, ANOTHER):
            self.assertNotIn(secret, texts)
        return texts

    def make_key(self, *, days: int = 0) -> str:
        """Make a key that has signed for some days, and return its `kid`."""
        kid = signing_keys.rotate(at_once=True)
        begin = clock.utcnow() - timedelta(days=days)
        this_one = SigningKey.kid == kid
        db.session.execute(update(SigningKey).where(this_one).values(signs_from=begin))
        db.session.commit()
        return kid

    def let_all_verify(self) -> None:
        """Let all keys verify tokens."""
        db.session.execute(update(SigningKey).values(verifies_until=None))
        db.session.commit()

    def test_good(self) -> None:
        """Nothing is wrong with an issuer, before its first start and afterwards."""
        found = self.findings(PRODUCTION | ISSUER)
        self.assertNotIn(Verdict.WRONG, {finding.verdict for finding in found})
        self.assertIn("There is no signing key yet", str(found))

        kid = self.make_key(days=365)
        words = f"Key {kid} has signed auth tokens for 365 days."
        self.assert_found(PRODUCTION | ISSUER, words, Verdict.OK)

    def test_settings(self) -> None:
        """An issuer without HTTPS and weak keys are wrong."""
        for base, settings, words in (
            (PRODUCTION, {"ISSUER": "http://localhost:5000"}, "ISSUER starts with http://"),
            (DEVELOPMENT, {"ENCRYPTION_KEYS": f"{OTHER},short"}, "number 2 of ENCRYPTION_KEYS is"),
            (DEVELOPMENT, {"ENCRYPTION_KEYS": "my_precious" * 4}, "number 1 of ENCRYPTION_KEYS is"),
        ):
            with self.subTest(words):
                self.assert_found(base | ISSUER | settings, words)

    def test_lifetime(self) -> None:
        """A token that lives longer than an hour is a note."""
        words = "learns only then that a session has ended"
        for seconds, expected in ((3_601, True), (3_600, False)):
            settings = {"TOKEN_EXPIRATION_DAYS": "0", "TOKEN_EXPIRATION_SECONDS": str(seconds)}
            with self.subTest(seconds):
                found = self.findings(PRODUCTION | ISSUER | settings)
                notes = [finding.text for finding in found if finding.verdict is Verdict.NOTE]
                self.assertEqual(expected, words in str(notes))
        self.assertNotIn(words, str(self.findings(PRODUCTION)))

    def test_old_key(self) -> None:
        """A key that has signed for more than a year is a note."""
        kid = self.make_key(days=366)

        words = f"Key {kid} has signed auth tokens for 366 days. python manage.py rotate_keys"
        self.assert_found(PRODUCTION | ISSUER, words, Verdict.NOTE)

    def test_encryption(self) -> None:
        """A private key that is needed and cannot be decrypted is wrong.

        A key that verifies only does not need its private key.
        """
        self.make_key(days=2)
        signing = self.make_key(days=1)
        self.let_all_verify()
        other = PRODUCTION | ISSUER | {"ENCRYPTION_KEYS": ANOTHER}

        self.assert_found(other, f"{signing}, which signs auth tokens: users cannot log in")

        self.app.config["ENCRYPTION_KEYS"] = (ANOTHER,)
        published = signing_keys.rotate()
        db.session.commit()
        words = f"{published}, which will sign auth tokens: users cannot log in"
        self.assert_found(PRODUCTION | ISSUER, words)

    def test_outdated_encryption(self) -> None:
        """Several keys are a note, and so is a private key that the first does not decrypt."""
        kid = self.make_key()
        both = PRODUCTION | ISSUER | {"ENCRYPTION_KEYS": f"{ANOTHER},{OTHER}"}
        words = f"{kid}, which signs auth tokens, is not encrypted with the first"

        self.assert_found(both, "Keys in ENCRYPTION_KEYS: 2.", Verdict.NOTE)
        self.assert_found(both, words, Verdict.NOTE)

        self.app.config["ENCRYPTION_KEYS"] = (ANOTHER, OTHER)
        self.assertEqual(1, signing_keys.reencrypt())
        db.session.commit()
        self.assertNotIn(words, str(self.findings(both)))

    def test_switched_off(self) -> None:
        """Without ISSUER, keys and clients from before are a note, and nothing else is told."""
        self.assertNotIn("ISSUER", str(self.findings(PRODUCTION)))
        self.make_key()
        words = "ISSUER is not set, and there are signing keys (1) and clients (0)"
        self.assert_found(PRODUCTION, words, Verdict.NOTE)


class TestSecondFactor(FindingsTestCase):
    """Findings about the second factor, without an issuer."""

    encrypted: ClassVar = PRODUCTION | {"ENCRYPTION_KEYS": OTHER}
    outdated = "Authenticators that are not encrypted with the first of ENCRYPTION_KEYS:"
    unreadable = "Authenticators that no key of ENCRYPTION_KEYS decrypts:"

    def assert_found(
        self, settings: dict[str, str], words: str, verdict: Verdict = Verdict.WRONG
    ) -> str:
        """Check and return the findings, and check that no secret is in them."""
        texts = super().assert_found(settings, words, verdict)
        for secret in (KEY, OTHER, ANOTHER):
            self.assertNotIn(secret, texts)
        return texts

    def add_authenticators(self, key: str, *confirmed: bool) -> None:
        """Add users with authenticators under this key, confirmed or not."""
        self.app.config["ENCRYPTION_KEYS"] = (key,)
        for number, is_confirmed in enumerate(confirmed):
            name = f"{key[:8]}{number}"
            user = add_user(name, f"{name}@test.com", "test", mfa_enabled=is_confirmed)
            secret = second_factor.encrypt("secret", user.id)
            step = 0 if is_confirmed else None
            db.session.add(TotpFactor(user_id=user.id, secret=secret, last_step=step))
        db.session.commit()

    def test_weak_keys(self) -> None:
        """Weak keys are wrong without an issuer too, because of the authenticators."""
        for keys, words in (
            (f"{OTHER},short", "Key number 2 of ENCRYPTION_KEYS is shorter"),
            ("my_precious" * 4, "Key number 1 of ENCRYPTION_KEYS is a well-known"),
        ):
            with self.subTest(words):
                texts = self.assert_found(DEVELOPMENT | {"ENCRYPTION_KEYS": keys}, words)

                self.assertNotIn("my_precious", texts)
                self.assertEqual(1, texts.count("knows the codes of every authenticator"))

    def test_good_keys(self) -> None:
        """A strong key is good; several are a note."""
        words = "Key number 1 of ENCRYPTION_KEYS is long enough"
        texts = self.assert_found(self.encrypted, words, Verdict.OK)
        self.assertNotIn("Keys in ENCRYPTION_KEYS", texts)

        both = self.encrypted | {"ENCRYPTION_KEYS": f"{OTHER},{ANOTHER}"}
        self.assert_found(both, "Keys in ENCRYPTION_KEYS: 2.", Verdict.NOTE)

    def test_required(self) -> None:
        """It is a note if no second factor is required, and good otherwise."""
        missing = "users cannot set up an authenticator"
        texts = self.assert_found(PRODUCTION, missing, Verdict.NOTE)
        self.assertNotIn("REQUIRE_MFA", texts)
        self.assertNotIn("ENCRYPTION_KEYS is long", texts)

        for required, verdict in (("none", Verdict.NOTE), ("admins", Verdict.OK)):
            with self.subTest(required):
                settings = self.encrypted | {"REQUIRE_MFA": required}
                texts = self.assert_found(settings, f"REQUIRE_MFA={required}", verdict)

                self.assertNotIn(missing, texts)
        settings = self.encrypted | {"REQUIRE_MFA": "all"}
        self.assert_found(settings, "A second factor is required (REQUIRE_MFA=all).", Verdict.OK)

    def test_admins(self) -> None:
        """Active admins without a second factor are a note, and no other users are."""
        words = "Active admins without a second factor:"
        add_user("user", "user@test.com", "test")
        add_user("gone", "gone@test.com", "test", admin=True, active=False)
        add_user("safe", "safe@test.com", "test", admin=True, mfa_enabled=True)
        self.assertNotIn(words, str(self.findings(self.encrypted)))

        for number in (1, 2):
            add_user(f"root{number}", f"root{number}@test.com", "test", admin=True)
            for settings in (self.encrypted, PRODUCTION):
                self.assert_found(settings, f"{words} {number}.", Verdict.NOTE)

    def test_readable(self) -> None:
        """Nothing is said of authenticators that the first key decrypts."""
        self.add_authenticators(OTHER, True, False)

        found = str(self.findings(self.encrypted))

        self.assertNotIn(self.outdated, found)
        self.assertNotIn(self.unreadable, found)

    def test_outdated(self) -> None:
        """Authenticators that only another key decrypts are a note until they are re-encrypted."""
        self.add_authenticators(OTHER, True, False, True)
        self.add_authenticators(ANOTHER, True)
        both = self.encrypted | {"ENCRYPTION_KEYS": f"{ANOTHER},{OTHER}"}

        texts = self.assert_found(both, f"{self.outdated} 3. Run python manage.py", Verdict.NOTE)
        self.assertNotIn(self.unreadable, texts)

        self.app.config["ENCRYPTION_KEYS"] = (ANOTHER, OTHER)
        self.assertEqual([(3, 0)], list(second_factor.reencrypt()))
        db.session.commit()
        self.assertNotIn(self.outdated, str(self.findings(both)))

    def test_unreadable(self) -> None:
        """Authenticators that no key decrypts are wrong, also if there is no key at all."""
        self.add_authenticators(OTHER, True, False)
        self.add_authenticators(ANOTHER, True)

        texts = self.assert_found(self.encrypted, f"{self.unreadable} 1. Their users")
        self.assertNotIn(self.outdated, texts)
        self.assert_found(PRODUCTION, f"{self.unreadable} 3. Their users")


@needs_openssl
class TestMail(FindingsTestCase):
    """Findings about email, with a mail server on loopback."""

    def setUp(self) -> None:
        """Start the mail server, whose certificate the application trusts."""
        super().setUp()
        self.server = self.enterContext(MailServer())
        self.mail = PRODUCTION | {
            "SMTP_URL": self.server.url,
            "SSL_CERT_FILE": certificate()[0],
            **MAIL,
        }

    def assert_found(
        self, settings: dict[str, str], words: str, verdict: Verdict = Verdict.WRONG
    ) -> str:
        """Check and return the findings, and check that no secret is in them."""
        texts = super().assert_found(settings, words, verdict)
        for secret in (PASSWORD, CREDENTIALS, "sesame", "relay"):
            self.assertNotIn(secret, texts)
        return texts

    def test_templates(self) -> None:
        """A template of the operator that cannot be rendered is found before it is needed."""
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (folder / "de").mkdir()
        for template, reason in (
            ('{% set subject = "x" %}{{ nothing }}', "UndefinedError: 'nothing' is undefined"),
            ("no subject", "has no attribute 'subject'"),
            ("{% if %}", "TemplateSyntaxError"),
        ):
            (folder / "de" / "reset.txt").write_text(template)
            settings = self.mail | {"MAIL_TEMPLATES": str(folder)}
            found = self.assert_found(settings, "The templates of reset in 'de'")
            self.assertIn(reason, found)

    def test_not_configured(self) -> None:
        """Without SMTP_URL there is a note; with EMAIL_VERIFICATION=required that is wrong."""
        words = "SMTP_URL is not set"
        for verification, verdict in (
            ("off", Verdict.NOTE),
            ("optional", Verdict.NOTE),
            ("required", Verdict.WRONG),
        ):
            with self.subTest(verification):
                settings = PRODUCTION | {"EMAIL_VERIFICATION": verification}
                self.assert_found(settings, words, verdict)

    def test_good(self) -> None:
        """A server that can be reached and accepts the password is good, and gets no email."""
        for settings in ({}, {"EMAIL_VERIFICATION": "required"}):
            with self.subTest(settings):
                words = "can be reached, and accepts"
                self.assert_found(self.mail | settings, words, Verdict.OK)
        self.assertEqual([], self.server.received)

    def test_pages(self) -> None:
        """A LINK_BASE_URL with http:// is wrong unless it is on this machine."""
        for url in ("http://app.example", "http://192.0.2.1:8000", "http://127.0.0.1.example"):
            with self.subTest(url):
                self.assert_found(self.mail | {"LINK_BASE_URL": url}, "LINK_BASE_URL")
        for url in ("https://app.example", "http://localhost:8000", "http://[::1]/account"):
            with self.subTest(url):
                found = self.findings(self.mail | {"LINK_BASE_URL": url})
                self.assertNotIn("LINK_BASE_URL", str(found))

    def test_plain(self) -> None:
        """Without TLS a password for another machine is wrong, and links are a note."""
        words = "SMTP_URL starts with smtp:// without ?starttls"
        with mock.patch("project.ops.checks.SmtpTransport.check"):
            for url, verdict in (
                ("smtp://relay:sesame@mail.example", Verdict.WRONG),
                ("smtp://mail.example:25", Verdict.NOTE),
                ("smtp://192.0.2.1", Verdict.NOTE),
            ):
                with self.subTest(url):
                    self.assert_found(self.mail | {"SMTP_URL": url}, words, verdict)
            for url in (
                "smtp://relay:sesame@mail.example?starttls",
                "smtps://relay:sesame@mail.example",
                "smtp://relay:sesame@127.0.0.1",
                "smtp://localhost",
            ):
                with self.subTest(url):
                    self.assertNotIn(words, str(self.findings(self.mail | {"SMTP_URL": url})))

    def test_server(self) -> None:
        """A server that cannot be used is wrong, with the reason and without the password."""
        plain = self.enterContext(MailServer(tls=False))
        for url, reason in (
            ("smtp://relay:sesame@127.0.0.1:1?starttls", "ConnectionRefusedError"),
            (self.server.url.replace("sesame", "sesame2"), "535 the mail server refused user"),
            (self.server.url.replace("127.0.0.1", "localhost"), "CERTIFICATE_VERIFY_FAILED"),
            (self.server.url.replace("smtp:", "smtps:").partition("?")[0], "SSLError"),
            (
                self.server.url.replace(str(self.server.port), str(plain.port)),
                "STARTTLS extension not supported",
            ),
        ):
            with self.subTest(reason):
                words = "The mail server of SMTP_URL cannot be used: "
                found = self.assert_found(self.mail | {"SMTP_URL": url}, words)
                self.assertRegex(found, f"{words}.*{reason}")

    def test_outbox(self) -> None:
        """Emails that wait and those that were given up are notes with their number."""
        with self.app.app_context():
            for number in range(3):
                outbox.add("reset", f"user{number}@test.com", "en")
            db.session.commit()
            mail = outbox.claim(1)[0]
            outbox.postpone(mail, "550 no mailbox", permanent=True)

        for words in ("Emails that were given up: 1.", "Emails that wait to be sent: 2."):
            self.assert_found(self.mail, words, Verdict.NOTE)


class TestHashing(unittest.TestCase):
    """What a hash should cost."""

    def test_verdicts(self) -> None:
        """Up to half a second is good; over a second, or a cost below 10, is wrong."""
        for rounds, seconds, verdict, words in (
            (13, 0.26, Verdict.OK, "takes 260 ms on this machine (BCRYPT_LOG_ROUNDS=13)."),
            (13, 0.50, Verdict.OK, "500 ms"),
            (13, 0.51, Verdict.NOTE, "BCRYPT_LOG_ROUNDS=12 would take 255 ms"),
            (13, 0.24, Verdict.NOTE, "BCRYPT_LOG_ROUNDS=14 would take 480 ms"),
            (13, 1.01, Verdict.WRONG, "BCRYPT_LOG_ROUNDS=11 would take 252 ms"),
            (14, 1.00, Verdict.NOTE, "BCRYPT_LOG_ROUNDS=13 would take 500 ms"),
            (9, 0.30, Verdict.WRONG, "BCRYPT_LOG_ROUNDS=10 would take 600 ms"),
            (4, 0.001, Verdict.WRONG, "BCRYPT_LOG_ROUNDS=12 would take 256 ms"),
            (10, 0.70, Verdict.OK, "700 ms"),
            (31, 80_000.0, Verdict.WRONG, "80,000,000 ms"),
        ):
            with self.subTest(rounds=rounds, seconds=seconds):
                found = checks.hash_cost(rounds, seconds)

                self.assertEqual(verdict, found.verdict, found)
                self.assertIn(words, found.text)

    def test_measuring(self) -> None:
        """Even a cost of hours is estimated at once, and each cost takes twice the one below."""
        ten, eleven, most = (hashing.seconds(rounds) for rounds in (10, 11, 31))

        self.assertGreater(ten, 0.002)
        self.assertTrue(1.2 < eleven / ten < 3.3, (ten, eleven))
        self.assertGreater(most, 1_000 * ten)


class TestServer(unittest.TestCase):
    """Findings about a PostgreSQL server."""

    config = {"GRANIAN_WORKERS": 2, "GRANIAN_BLOCKING_THREADS": 16}  # noqa: RUF012  # never changed

    def serving(self, options: dict[str, str], **changes: Any) -> list[Finding]:
        """Return the findings about a good server with these changes."""
        server = GOOD_SERVER._replace(**changes)
        return list(checks.server_findings(server, self.config, options))  # type: ignore[arg-type]

    def test_this_machine(self) -> None:
        """A socket or a connection from a machine to itself stays on this machine."""
        one, other = socket.socketpair()
        with one, other:
            self.assertIsNone(checks.peer_address(one.fileno()))
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname()) as line,
        ):
            self.assertIsNone(checks.peer_address(line.fileno()))

    def test_good(self) -> None:
        """A server that is encrypted, authenticated and large enough is good."""
        found = self.serving({"sslmode": "verify-full"})

        self.assertEqual({Verdict.OK}, {finding.verdict for finding in found}, found)

    def test_findings(self) -> None:
        """Each finding by itself."""
        for changes, sslmode, verdict, words in (
            ({"skew": 1.1}, "verify-full", Verdict.WRONG, "1.1 s behind"),
            ({"skew": -1.1}, "verify-full", Verdict.WRONG, "1.1 s ahead"),
            ({"skew": -0.9}, "verify-full", Verdict.OK, "agree"),
            ({"superuser": True}, "verify-full", Verdict.NOTE, "superuser"),
            ({"standby": True}, "verify-full", Verdict.WRONG, "target_session_attrs=read-write"),
            ({"read_only": True}, "verify-full", Verdict.WRONG, "default_transaction_read_only"),
            ({"connections": 65}, "verify-full", Verdict.WRONG, "may open 66"),
            ({"connections": 66}, "verify-full", Verdict.OK, "at most 66: enough for 1 server."),
            ({"connections": 131}, "verify-full", Verdict.OK, "enough for 1 server."),
            ({"connections": 132}, "verify-full", Verdict.OK, "enough for 2 servers."),
            ({"encoding": "LATIN1"}, "verify-full", Verdict.WRONG, "is LATIN1"),
            ({"connections": 10, "pooled": True}, "verify-full", Verdict.OK, "pooler"),
            ({}, "require", Verdict.NOTE, "sslmode=require"),
            ({"encrypted": False, "address": "8.8.8.8"}, "", Verdict.WRONG, "8.8.8.8 is not"),
            ({"encrypted": False, "address": "2600::1"}, "", Verdict.WRONG, "2600::1 is not"),
            ({"encrypted": False, "address": "172.18.0.2"}, "", Verdict.NOTE, "not encrypted"),
            ({"encrypted": False, "address": "fd00::2"}, "", Verdict.NOTE, "not encrypted"),
            ({"encrypted": False, "address": None}, "", Verdict.OK, "stays on this machine"),
        ):
            with self.subTest(changes, sslmode=sslmode):
                options = {"sslmode": sslmode} if sslmode else {}
                found = self.serving(options, **changes)

                matching = [finding for finding in found if words in finding.text]
                self.assertEqual([verdict], [finding.verdict for finding in matching], found)
                others = {finding.verdict for finding in found if finding not in matching}
                self.assertEqual({Verdict.OK}, others, found)
