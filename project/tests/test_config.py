"""The settings: the defaults of each environment, and what is refused at start."""

import os
import secrets
import stat
import tempfile
import threading
import unittest
from pathlib import Path
from typing import ClassVar
from unittest import mock

from sqlalchemy import make_url

from project import create_app
from project.config import (
    SECRETS,
    BaseConfig,
    DevelopmentConfig,
    ProductionConfig,
    TestingConfig,
)
from project.errors import ConfigurationError
from project.tests import scratch

STRONG_KEY = secrets.token_hex(32)
POSTGRESQL = "postgresql://user:sesame@db.example/users"
PRODUCTION = {"SECRET_KEY": STRONG_KEY, "DATABASE_URL": POSTGRESQL}


class ConfigTestCase(unittest.TestCase):
    """A test with an instance folder of its own."""

    def setUp(self) -> None:
        """Set an instance folder that does not exist yet."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.instance = Path(folder.name) / "instance"
        patcher = mock.patch("project.config.INSTANCE", self.instance)
        patcher.start()
        self.addCleanup(patcher.stop)

    def assert_refused(
        self, config: type[BaseConfig], environment: dict[str, str], *words: str
    ) -> str:
        """Check that the settings are refused in one line with these words, and return it."""
        with self.assertRaises(ConfigurationError) as caught:
            config.from_environment(environment)
        line = str(caught.exception)
        self.assertEqual(1, len(line.splitlines()))
        for word in words:
            self.assertIn(word, line)
        return line


class TestDevelopmentConfig(ConfigTestCase):
    """Development."""

    def test_app_is_development(self) -> None:
        """Debugging, cost 4, thirty days, any password, and the database of DATABASE_URL."""
        config = DevelopmentConfig.from_environment({"DATABASE_URL": POSTGRESQL})

        self.assertTrue(config.DEBUG)
        self.assertFalse(config.TESTING)
        self.assertEqual(4, config.BCRYPT_LOG_ROUNDS)
        self.assertEqual(1, config.PASSWORD_MIN_LENGTH)
        self.assertEqual(30, config.TOKEN_EXPIRATION_DAYS)
        self.assertEqual(0, config.TOKEN_EXPIRATION_SECONDS)
        self.assertTrue(config.USERS_API_OPEN)
        self.assertEqual(
            "postgresql+psycopg2://user:sesame@db.example/users",
            config.SQLALCHEMY_DATABASE_URI,
        )

    def test_development_is_the_default(self) -> None:
        """Without APP_SETTINGS the application is in development."""
        with scratch.database() as url:
            environment = scratch.settings(DATABASE_URL=url, SECRET_KEY="any")
            with mock.patch.dict(os.environ, environment, clear=True):
                app = create_app()

            self.assertTrue(app.debug)
            self.assertFalse(app.testing)

    def test_database_is_embedded_unless_named(self) -> None:
        """Without DATABASE_URL the database is an SQLite file in the instance folder."""
        config = DevelopmentConfig.from_environment({"DATABASE_URL": " "})

        self.assertEqual(f"sqlite:///{self.instance}/users.db", config.SQLALCHEMY_DATABASE_URI)
        self.assertTrue(config.EMBEDDED_DATABASE)
        self.assertFalse(
            DevelopmentConfig.from_environment({"DATABASE_URL": POSTGRESQL}).EMBEDDED_DATABASE
        )

    def test_embedded_database_is_migrated_at_the_first_start(self) -> None:
        """The application creates the schema of the embedded database itself."""
        with mock.patch.dict(os.environ, scratch.settings(), clear=True):
            app = create_app("project.config.DevelopmentConfig")
        user = {"username": "first", "email": "first@test.com", "password": "test"}

        response = app.test_client().post("/auth/register", json=user)

        self.assertEqual(201, response.status_code)
        with app.app_context():
            for engine in app.extensions["sqlalchemy"].engines.values():
                engine.dispose()

    def test_keys_are_made_once_for_their_owner_alone(self) -> None:
        """The keys are random, stay the same, and only their owner can read the files."""
        made = [DevelopmentConfig.from_environment({}) for _ in range(2)]

        keys = {(config.SECRET_KEY, *config.ENCRYPTION_KEYS) for config in made}
        self.assertEqual(1, len(keys))
        secret_key, encryption_key = keys.pop()
        self.assertNotEqual(secret_key, encryption_key)
        expected = {"secret_key": secret_key, "encryption_key": encryption_key}
        stored = {path.name: path.read_text() for path in self.instance.iterdir()}
        self.assertEqual(expected, stored, "drafts are gone")
        for name, key in expected.items():
            self.assertLessEqual(32, len(key))
            self.assertEqual(0o600, stat.S_IMODE((self.instance / name).stat().st_mode))

    def test_processes_that_start_together_agree_on_the_keys(self) -> None:
        """Of processes that create the keys at once, one wins and all use its keys."""
        barrier = threading.Barrier(8)
        keys = []

        def start() -> None:
            barrier.wait()
            config = DevelopmentConfig.from_environment({})
            keys.append((config.SECRET_KEY, config.ENCRYPTION_KEYS))

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        self.assertEqual(8, len(keys))
        self.assertEqual(1, len(set(keys)))

    def test_empty_key_file_is_refused(self) -> None:
        """An empty key file is refused."""
        self.instance.mkdir()
        for name in ("secret_key", "encryption_key"):
            with self.subTest(name):
                (self.instance / name).touch()

                self.assert_refused(DevelopmentConfig, {}, name, "empty")
                (self.instance / name).unlink()

    def test_instance_folder_that_cannot_be_made(self) -> None:
        """The refusal names the folder, and the settings to use instead, with which it is not made.

        Each of them alone does not suffice.
        """
        self.instance.parent.joinpath("file").touch()
        instead = PRODUCTION | {"ENCRYPTION_KEYS": secrets.token_hex(32)}
        with mock.patch("project.config.INSTANCE", self.instance.parent / "file" / "instance"):
            for name in instead:
                others = {key: value for key, value in instead.items() if key != name}
                with self.subTest(missing=name):
                    self.assert_refused(DevelopmentConfig, others, "file/instance", *instead)
            DevelopmentConfig.from_environment(instead)


class TestTestingConfig(ConfigTestCase):
    """Tests."""

    def test_app_is_testing(self) -> None:
        """Testing, cost 4, three seconds, any password, and the database of DATABASE_TEST_URL."""
        config = TestingConfig.from_environment(
            {"DATABASE_TEST_URL": POSTGRESQL, "DATABASE_URL": "sqlite:////elsewhere"}
        )

        self.assertTrue(config.DEBUG)
        self.assertTrue(config.TESTING)
        self.assertEqual(4, config.BCRYPT_LOG_ROUNDS)
        self.assertEqual(1, config.PASSWORD_MIN_LENGTH)
        self.assertEqual(0, config.TOKEN_EXPIRATION_DAYS)
        self.assertEqual(3, config.TOKEN_EXPIRATION_SECONDS)
        self.assertTrue(config.USERS_API_OPEN)
        self.assertEqual(
            "postgresql+psycopg2://user:sesame@db.example/users",
            config.SQLALCHEMY_DATABASE_URI,
        )

    def test_any_key_is_accepted(self) -> None:
        """The lesson's own key is accepted, and without a key there is a random one."""
        given = TestingConfig.from_environment({"SECRET_KEY": "changeme"}).SECRET_KEY
        made = {TestingConfig.from_environment({}).SECRET_KEY for _ in range(2)}

        self.assertEqual("changeme", given)
        self.assertEqual(2, len(made))

    def test_never_on_the_database_of_the_service(self) -> None:
        """Tests empty their database, so it must not be the one of DATABASE_URL."""
        self.assert_refused(
            TestingConfig,
            {"DATABASE_TEST_URL": POSTGRESQL, "DATABASE_URL": POSTGRESQL},
            "DATABASE_TEST_URL",
            "DATABASE_URL",
        )


class TestProductionConfig(ConfigTestCase):
    """Production."""

    def test_app_is_production(self) -> None:
        """No debugging, cost 13, thirty days, 12 characters, and a closed users API."""
        config = ProductionConfig.from_environment(PRODUCTION)

        self.assertFalse(config.DEBUG)
        self.assertFalse(config.TESTING)
        self.assertEqual(13, config.BCRYPT_LOG_ROUNDS)
        self.assertEqual(12, config.PASSWORD_MIN_LENGTH)
        self.assertEqual(30, config.TOKEN_EXPIRATION_DAYS)
        self.assertEqual(0, config.TOKEN_EXPIRATION_SECONDS)
        self.assertFalse(config.USERS_API_OPEN)
        self.assertEqual(STRONG_KEY, config.SECRET_KEY)

    def test_weak_keys_are_refused(self) -> None:
        """A missing, short, well-known or trivial key is refused and not shown."""
        weak = {
            "missing": "",
            "blank": "   ",
            "the lesson's": "changeme",
            "31 bytes": secrets.token_hex(16)[:31],
            "a tutorial's": "my_precious_my_precious_my_precious",
            "documentation's": "192b9bdd22ab9ed4d12e236c78afcb9a393ec15f71bbf5dc987d54727823bcbf",
            "an example's": "a-string-secret-at-least-256-bits-long",
            "one character": "x" * 64,
        }
        for name, key in weak.items():
            with self.subTest(name):
                line = self.assert_refused(
                    ProductionConfig, PRODUCTION | {"SECRET_KEY": key}, "SECRET_KEY"
                )

                self.assertTrue(not key.strip() or key not in line)

    def test_database_has_to_be_named(self) -> None:
        """Production has no embedded database."""
        self.assert_refused(ProductionConfig, {"SECRET_KEY": STRONG_KEY}, "DATABASE_URL is missing")

    def test_all_errors_are_reported_at_once(self) -> None:
        """One line names every missing variable."""
        self.assert_refused(ProductionConfig, {}, "SECRET_KEY", "DATABASE_URL")

    def test_own_settings_are_as_strict(self) -> None:
        """A class derived from BaseConfig refuses weak keys by default."""
        self.assert_refused(BaseConfig, PRODUCTION | {"SECRET_KEY": "x"}, "SECRET_KEY")


class TestEnvironment(ConfigTestCase):
    """Casts and checks of all environments."""

    def test_wrong_values_are_named(self) -> None:
        """An invalid value is refused with its variable and the value."""
        wrong = {
            "TOKEN_EXPIRATION_DAYS": "a month",
            "TOKEN_EXPIRATION_SECONDS": "-1",
            "REFRESH_EXPIRATION_SECONDS": "0",
            "SESSION_EXPIRATION_SECONDS": "90 days",
            "BCRYPT_LOG_ROUNDS": "3",
            "BCRYPT_THREADS": "0",
            "PASSWORD_MIN_LENGTH": "65",
            "BODY_TIMEOUT": "0",
            "TRUSTED_PROXIES": "11",
            "FORCE_HTTPS": "perhaps",
            "CORS_ORIGINS": "app.example",
            "USERS_API_OPEN": "perhaps",
            "LOG_LEVEL": "LOUD",
            "LOG_PROBES": "sometimes",
            "GRANIAN_WORKERS": "2.5",
            "GRANIAN_BLOCKING_THREADS": "",
        }
        for name, value in wrong.items():
            if value:
                with self.subTest(name):
                    self.assert_refused(ProductionConfig, PRODUCTION | {name: value}, name, value)

    def test_values_are_cast(self) -> None:
        """Numbers, booleans and paths are cast."""
        config = ProductionConfig.from_environment(
            PRODUCTION
            | {
                "TOKEN_EXPIRATION_DAYS": "1",
                "TOKEN_EXPIRATION_SECONDS": "30",
                "BCRYPT_LOG_ROUNDS": "12",
                "USERS_API_OPEN": "true",
                "LOG_LEVEL": "Warning",
                "DRAIN_FILE": "/run/users-1/drain",
            }
        )

        self.assertEqual(
            (1, 30, 12, True, "WARNING", Path("/run/users-1/drain")),
            (
                config.TOKEN_EXPIRATION_DAYS,
                config.TOKEN_EXPIRATION_SECONDS,
                config.BCRYPT_LOG_ROUNDS,
                config.USERS_API_OPEN,
                config.LOG_LEVEL,
                config.DRAIN_FILE,
            ),
        )

    def test_tokens_have_to_live(self) -> None:
        """A token lifetime of zero is refused."""
        self.assert_refused(
            ProductionConfig,
            PRODUCTION | {"TOKEN_EXPIRATION_DAYS": "0"},
            "TOKEN_EXPIRATION_DAYS",
            "TOKEN_EXPIRATION_SECONDS",
        )

    def test_sessions_outlive_tokens(self) -> None:
        """A token lifetime beyond the session's is refused with both values."""
        for changes, longest in (
            ({"TOKEN_EXPIRATION_DAYS": "365"}, "31536000"),
            ({"REFRESH_EXPIRATION_SECONDS": "7776001"}, "7776001"),
        ):
            with self.subTest(longest):
                self.assert_refused(
                    ProductionConfig,
                    PRODUCTION | changes,
                    "SESSION_EXPIRATION_SECONDS=7776000",
                    longest,
                )

    def test_lifetimes(self) -> None:
        """By default a refresh token lives 30 days and a session at most 90."""
        config = ProductionConfig.from_environment(PRODUCTION)

        self.assertEqual(30 * 86_400, config.REFRESH_EXPIRATION_SECONDS)
        self.assertEqual(90 * 86_400, config.SESSION_EXPIRATION_SECONDS)

    def test_origins(self) -> None:
        """Origins are spelled as browsers send them; any other spelling is refused."""
        good = "https://app.example,  http://localhost:3000,http://[::1]:3000 , capacitor://app"
        config = ProductionConfig.from_environment(PRODUCTION | {"CORS_ORIGINS": good})

        self.assertEqual({part.strip() for part in good.split(",")}, config.CORS_ORIGINS)
        for bad in (
            "app.example",
            "https://",
            "https://app.example/",
            "https://app.example/path",
            "https://app.example?x",
            "https://app.example#x",
            "https://user@app.example",
            "https://*.app.example",
            "https://App.example",
            "https://bücher.example",
            "https://app.example:443",
            "http://app.example:80",
            "http://app.example:",
            "http://app.example:x",
            "//app.example",
            "null",
            "https://app.example https://other.example",
            "https://app.example,",
        ):
            for config_class in (ProductionConfig, TestingConfig):
                with self.subTest(bad, config=config_class.__name__):
                    environment = PRODUCTION | {"CORS_ORIGINS": f"https://other.example, {bad}"}
                    self.assert_refused(config_class, environment, "CORS_ORIGINS", bad)

    def test_any_origin(self) -> None:
        """Any origin ("*") is accepted in development and tests, and refused in production."""
        any_origin = PRODUCTION | {"CORS_ORIGINS": "*"}
        for config in (DevelopmentConfig, TestingConfig):
            self.assertEqual({"*"}, config.from_environment(any_origin).CORS_ORIGINS)
        for value in ("*", "https://app.example, *"):
            for strict in (ProductionConfig, BaseConfig):
                environment = PRODUCTION | {"CORS_ORIGINS": value}
                self.assert_refused(strict, environment, f"CORS_ORIGINS={value!r}", "name")

    def test_no_proxy_by_default(self) -> None:
        """By default no proxy is trusted, no origin is allowed and HTTPS is not required."""
        for config in (DevelopmentConfig, TestingConfig, ProductionConfig):
            made = config.from_environment(PRODUCTION)

            self.assertEqual(
                (0, False, frozenset()),
                (made.TRUSTED_PROXIES, made.FORCE_HTTPS, made.CORS_ORIGINS),
            )

    def test_database_urls(self) -> None:
        """Every spelling of PostgreSQL uses psycopg2; other databases are refused and not shown."""
        plain = POSTGRESQL.removeprefix("postgresql")
        for scheme in ("postgres", "postgresql", "postgresql+psycopg2"):
            with self.subTest(scheme):
                config = ProductionConfig.from_environment(
                    PRODUCTION | {"DATABASE_URL": scheme + plain}
                )

                self.assertEqual("postgresql+psycopg2" + plain, config.SQLALCHEMY_DATABASE_URI)
        for url in ("mysql" + plain, "sqlite://", "sqlite:///:memory:", "sesame", "postgresql"):
            with self.subTest(url):
                line = self.assert_refused(
                    ProductionConfig, PRODUCTION | {"DATABASE_URL": url}, "DATABASE_URL"
                )

                self.assertNotIn("sesame", line)

    def test_several_hosts(self) -> None:
        """Hosts that are separated by commas are those that libpq would connect to."""
        for url, hosts, ports in (
            ("user:p@h1:5432,h2:5433/users?target_session_attrs=read-write", "h1,h2", "5432,5433"),
            ("user:p@h1,h2:5433/users?target_session_attrs=read-write", "h1,h2", ",5433"),
            ("user:p@[::1]:5432,[fe80::2]/users", "::1,fe80::2", "5432,"),
            ("user:p,@h1,%2Frun%2Fpostgresql/users", "h1,/run/postgresql", ","),
            ("h1,h2/users?sslmode=require", "h1,h2", ","),
            ("/users?host=h1:5432&host=h2:5433", "h1,h2", "5432,5433"),
            ("/users?host=h1,h2&port=5432,5433", "h1,h2", "5432,5433"),
        ):
            with self.subTest(url):
                given = PRODUCTION | {"DATABASE_URL": f"postgresql://{url}"}
                made = make_url(ProductionConfig.from_environment(given).SQLALCHEMY_DATABASE_URI)

                _, parameters = made.get_dialect()().create_connect_args(made)
                self.assertEqual((hosts, ports), (parameters["host"], parameters["port"]))
                self.assertEqual("users", parameters["dbname"])
                self.assertEqual(
                    made.query.get("target_session_attrs"), parameters.get("target_session_attrs")
                )
        for url in ("h1:x,h2/users", "h1,:5432/users", "/users?host=h1,h2,h3&port=1,2"):
            with self.subTest(url):
                given = PRODUCTION | {"DATABASE_URL": f"postgresql://{url}"}
                self.assert_refused(ProductionConfig, given, "DATABASE_URL is not a database URL")

    def test_special_characters_in_a_database_url(self) -> None:
        """A password that would be read as a part of the host is refused and not shown."""
        for url in (
            "user:open@sesame@h1/users",
            "user:open@sesame/@h1/users",
            "user:open@sesame:1@h1,h2/users",
            "us/er:sesame@h1/users",
            "us/er:sesame@h1,h2/users",
        ):
            with self.subTest(url):
                given = PRODUCTION | {"DATABASE_URL": f"postgresql://{url}"}
                line = self.assert_refused(ProductionConfig, given, "percent-encode")

                self.assertNotIn("sesame", line)
        given = PRODUCTION | {"DATABASE_URL": "postgresql://user:s%40s%2F@h1,h2/users"}
        made = make_url(ProductionConfig.from_environment(given).SQLALCHEMY_DATABASE_URI)
        self.assertEqual("s@s/", made.password)

    def test_unknown_settings_class(self) -> None:
        """An unknown class in APP_SETTINGS is refused with its name."""
        for path in (
            "project.config.NoSuchConfig",
            "nowhere.Config",
            "project.config.os",
            "x",
            "..x",
        ):
            with self.subTest(path), self.assertRaises(ConfigurationError) as caught:
                create_app(path)
            self.assertIn(f"APP_SETTINGS={path!r}", str(caught.exception))

    def test_refusal_ends_a_process_with_one_line(self) -> None:
        """A command with refused settings prints one line and exits with 1."""
        result = scratch.manage("db", "current", APP_SETTINGS="project.config.ProductionConfig")

        self.assertEqual(1, result.returncode)
        self.assertEqual("", result.stdout)
        self.assertEqual(
            ["Configuration error: SECRET_KEY is missing; DATABASE_URL is missing"],
            result.stderr.splitlines(),
        )


class TestFiles(ConfigTestCase):
    """Secrets in files, as containers have them: SECRET_KEY_FILE and so on."""

    VALUES: ClassVar[dict[str, str]] = {
        "SECRET_KEY": STRONG_KEY,
        "SECRET_KEY_FALLBACKS": secrets.token_hex(32),
        "ENCRYPTION_KEYS": secrets.token_hex(32),
        "DATABASE_URL": POSTGRESQL,
        "SMTP_URL": "smtps://user:sesame@mail.example",
    }
    OTHERS: ClassVar[dict[str, str]] = {
        "MAIL_FROM": "users@example.com",
        "LINK_BASE_URL": "https://app.example",
    }

    def file(self, contents: bytes) -> str:
        """Return the name of a new file."""
        path = self.instance.parent / secrets.token_hex(8)
        path.write_bytes(contents)
        return str(path)

    def test_every_secret(self) -> None:
        """Each secret can be in a file; newlines at its end do not count."""
        expected = ProductionConfig.from_environment(self.VALUES | self.OTHERS)
        for end in (b"", b"\n", b"\r\n", b"\n\n"):
            with self.subTest(end):
                files = {
                    f"{name}_FILE": self.file(value.encode() + end)
                    for name, value in self.VALUES.items()
                }

                self.assertEqual(expected, ProductionConfig.from_environment(files | self.OTHERS))
        self.assertEqual({*SECRETS}, {*self.VALUES, "DATABASE_TEST_URL"})

    def test_tests(self) -> None:
        """The database of the tests can be in a file, and is not the service's in a file either."""
        url = {"DATABASE_TEST_URL_FILE": self.file(POSTGRESQL.encode())}

        config = TestingConfig.from_environment(url)

        self.assertIn("sesame@db.example", config.SQLALCHEMY_DATABASE_URI)
        for other in ({"DATABASE_URL": POSTGRESQL}, {"DATABASE_URL_FILE": self.file(b"  ")}):
            self.assert_refused(TestingConfig, url | other, "DATABASE_URL")

    def test_refused(self) -> None:
        """A file that is missing, a folder, empty or not text is refused; its name is not shown."""
        for reason, path in {
            "No such file or directory": f"{self.instance}/{STRONG_KEY}",
            "Is a directory": str(self.instance.parent),
            "the file is empty": self.file(b" \n"),
            "the file is not text in UTF-8": self.file(b"sesame\xff"),
        }.items():
            for name in SECRETS:
                with self.subTest(reason, name=name):
                    environment = {**self.VALUES, **self.OTHERS, f"{name}_FILE": path}
                    environment.pop(name, None)
                    line = self.assert_refused(ProductionConfig, environment, f"{name}_FILE: ")

                    self.assertIn(reason, line)
                    self.assertNotIn(path, line)
                    self.assertNotIn("sesame", line)

    def test_unreadable(self) -> None:
        """A file that the service may not read is refused."""
        with mock.patch.object(Path, "read_text", side_effect=PermissionError(13, "Denied")):
            files = {f"{name}_FILE": "/run/secrets/file" for name in self.VALUES}
            line = self.assert_refused(ProductionConfig, files)

        for name in self.VALUES:
            self.assertIn(f"{name}_FILE: the file cannot be read (Denied)", line)

    def test_both(self) -> None:
        """A secret in a variable and in a file is refused."""
        for name, value in self.VALUES.items():
            with self.subTest(name):
                file = {f"{name}_FILE": self.file(value.encode())}
                line = self.assert_refused(ProductionConfig, self.VALUES | self.OTHERS | file)

                expected = f"{name} and {name}_FILE are both set"
                self.assertEqual(f"Configuration error: {expected}", line)

    def test_weak(self) -> None:
        """A secret in a file is as strict as one in a variable, and is not shown."""
        weak = {"SECRET_KEY_FILE": self.file(b"changeme\n"), "DATABASE_URL": POSTGRESQL}

        line = self.assert_refused(ProductionConfig, weak, "SECRET_KEY is shorter")

        self.assertNotIn("changeme", line)


class TestMail(ConfigTestCase):
    """The settings of email."""

    mail = PRODUCTION | {
        "SMTP_URL": "smtp://relay:sesame@mail.example:587?starttls",
        "MAIL_FROM": "Example <users@app.example>",
        "LINK_BASE_URL": "https://app.example/account/",
    }

    def test_good(self) -> None:
        """Every form of SMTP_URL is accepted; LINK_BASE_URL loses the slash at its end."""
        for url in (
            "smtp://mail.example",
            "smtp://mail.example:2525",
            "smtp://[::1]:25",
            "smtp://relay:p%40ss%3A%2F@mail.example?starttls",
            "smtps://relay:sesame@mail.example",
            "smtps://relay:sesame@mail.example:465",
        ):
            with self.subTest(url):
                config = ProductionConfig.from_environment(self.mail | {"SMTP_URL": url})

                self.assertEqual(url, config.SMTP_URL)
                self.assertEqual("https://app.example/account", config.LINK_BASE_URL)

    def test_defaults(self) -> None:
        """By default no email is sent, and no address has to be confirmed."""
        config = ProductionConfig.from_environment(PRODUCTION)

        self.assertEqual((None, None), (config.SMTP_URL, config.MAIL_FROM))
        self.assertEqual("off", config.EMAIL_VERIFICATION)
        self.assertEqual((True, True), (config.SECURITY_NOTICES, config.MAIL_SENDER))
        lifetimes = (
            config.RESET_LINK_SECONDS,
            config.EMAIL_LINK_SECONDS,
            config.VERIFICATION_LINK_SECONDS,
            config.INVITATION_LINK_SECONDS,
        )
        self.assertEqual((1_800, 7_200, 86_400, 604_800), lifetimes)

    def test_mail_server(self) -> None:
        """Any other SMTP_URL is refused, and neither the URL nor the password is shown."""
        for url in (
            "sesame",
            "mail.example:587",
            "http://relay:sesame@mail.example",
            "smtp://?starttls",
            "smtp://relay:sesame@:587",
            "smtp://relay:sesame@mail.example:port",
            "smtp://relay:sesame@mail.example:65536",
            "smtp://relay:sesame@mail.example/path",
            "smtp://relay:sesame@mail.example#fragment",
            "smtp://relay:sesame@mail.example?tls",
            "smtp://relay:sesame@mail.example?starttls=1",
            "smtps://relay:sesame@mail.example?starttls",
            "smtp://relay@mail.example",
            "smtp://:sesame@mail.example",
            "smtp://relay:@mail.example",
            "smtp://relay:sesame%C3%A9@mail.example",
            "smtp://relay:ses/ame@mail.example",
            "smtp://[relay:sesame@mail.example",
        ):
            for config in (ProductionConfig, DevelopmentConfig, TestingConfig):
                with self.subTest(url, config=config.__name__):
                    line = self.assert_refused(config, self.mail | {"SMTP_URL": url}, "SMTP_URL")

                    for secret in ("sesame", "ses/ame", "relay", url):
                        self.assertNotIn(secret, line)

    def test_wrong_values(self) -> None:
        """An invalid value of another setting is refused with its name and the value."""
        with tempfile.NamedTemporaryFile() as file:
            for name, values in {
                "MAIL_FROM": (
                    "users",
                    "users@",
                    "@app.example",
                    "Example <users>",
                    "Example <users@app.example>\r\nBcc: eve@test.com",
                    "Exa\nmple <users@app.example>",
                ),
                "LINK_BASE_URL": (
                    "app.example",
                    "//app.example",
                    "https://",
                    "ftp://app.example",
                    "javascript:alert(1)",
                    "https://app.example/?page",
                    "https://app.example/#/account",
                ),
                "MAIL_TEMPLATES": ("/nowhere", file.name),
                "MAIL_SENDER": ("perhaps",),
                "EMAIL_VERIFICATION": ("on", "true", "Required", "optional "),
                "SECURITY_NOTICES": ("perhaps",),
                "RESET_LINK_SECONDS": ("59", "0", "-1", "31622401", "30 minutes"),
                "EMAIL_LINK_SECONDS": ("59", "31622401", "2h"),
                "VERIFICATION_LINK_SECONDS": ("59", "31622401", "1.5"),
                "INVITATION_LINK_SECONDS": ("59", "31622401", "a week"),
            }.items():
                for value in values:
                    with self.subTest(name, value=value):
                        line = self.assert_refused(
                            ProductionConfig, self.mail | {name: value}, f"{name}={value!r}: "
                        )

                        self.assertNotIn("sesame", line)
                        self.assertNotIn(";", line)

    def test_bounds(self) -> None:
        """A link may live a minute to 366 days."""
        for name in (
            "RESET_LINK_SECONDS",
            "EMAIL_LINK_SECONDS",
            "VERIFICATION_LINK_SECONDS",
            "INVITATION_LINK_SECONDS",
        ):
            for seconds in (60, 366 * 86_400):
                with self.subTest(name, seconds=seconds):
                    config = ProductionConfig.from_environment(self.mail | {name: str(seconds)})

                    self.assertEqual(seconds, getattr(config, name))

    def test_incomplete(self) -> None:
        """SMTP_URL needs a sender and the page that links lead to."""
        for missing, words in (
            ({"MAIL_FROM": ""}, "SMTP_URL needs MAIL_FROM too"),
            ({"LINK_BASE_URL": ""}, "SMTP_URL needs LINK_BASE_URL too"),
            (
                {"MAIL_FROM": "", "LINK_BASE_URL": " "},
                "SMTP_URL needs MAIL_FROM and LINK_BASE_URL too",
            ),
        ):
            with self.subTest(words):
                line = self.assert_refused(ProductionConfig, self.mail | missing, words)

                self.assertEqual(f"Configuration error: {words}", line)


class TestSecretKeyFallbacks(ConfigTestCase):
    """SECRET_KEY_FALLBACKS."""

    def fallbacks(self, config: type[BaseConfig], text: str) -> tuple[str, ...]:
        """Return the keys in this value of the setting."""
        return config.from_environment(
            PRODUCTION | {"SECRET_KEY_FALLBACKS": text}
        ).SECRET_KEY_FALLBACKS

    def test_keys(self) -> None:
        """Keys are separated by commas and taken exactly; by default there are none."""
        one, two = secrets.token_hex(32), secrets.token_urlsafe(32)
        for config in (ProductionConfig, BaseConfig, DevelopmentConfig, TestingConfig):
            with self.subTest(config=config.__name__):
                self.assertEqual((), self.fallbacks(config, ""))
                self.assertEqual((), self.fallbacks(config, "  "))
                self.assertEqual((one,), self.fallbacks(config, one))
                self.assertEqual((one, two), self.fallbacks(config, f"{one},{two}"))
                self.assertEqual((f"{one}\n",), self.fallbacks(config, f"{one}\n"))

    def test_refused(self) -> None:
        """Empty, repeated and too many keys are refused, and no key is shown."""
        keys = [secrets.token_hex(32) for _ in range(6)]
        present = PRODUCTION["SECRET_KEY"]
        for text, reason in {
            f"{keys[0]},": "an empty key",
            f",{keys[0]}": "an empty key",
            f"{keys[0]},,{keys[1]}": "an empty key",
            ",": "an empty key",
            f"{keys[0]}, {keys[1]}": "a blank beside a comma",
            f"{keys[0]}\t,{keys[1]}": "a blank beside a comma",
            f"{keys[0]}, ": "a blank beside a comma",
            f"{keys[0]},{keys[1]},{keys[0]}": "a key in it twice",
            f"{keys[0]},{present}": "the SECRET_KEY itself",
            present: "the SECRET_KEY itself",
            ",".join(keys): "more than 5 keys",
        }.items():
            for config in (ProductionConfig, DevelopmentConfig, TestingConfig):
                with self.subTest(reason, config=config.__name__):
                    environment = PRODUCTION | {"SECRET_KEY_FALLBACKS": text}
                    line = self.assert_refused(config, environment, "SECRET_KEY_FALLBACKS", reason)
                    for key in (*keys, present):
                        self.assertNotIn(key, line)

    def test_weak_keys_are_refused(self) -> None:
        """A weak old key is refused by its number in production."""
        strong = secrets.token_hex(32)
        for weak, reason in {
            "changeme": "shorter than 32 bytes",
            secrets.token_hex(16)[:31]: "shorter than 32 bytes",
            "my_precious_my_precious_my_precious": "well-known or trivial",
            "x" * 64: "well-known or trivial",
        }.items():
            for config in (ProductionConfig, BaseConfig):
                environment = PRODUCTION | {"SECRET_KEY_FALLBACKS": f"{strong},{weak}"}
                with self.subTest(reason, config=config.__name__):
                    line = self.assert_refused(
                        config, environment, "SECRET_KEY_FALLBACKS", "number 2", reason
                    )
                    self.assertNotIn(weak, line)
            self.assertEqual((weak,), self.fallbacks(DevelopmentConfig, weak))

    def test_all_at_once(self) -> None:
        """Errors in these keys and in other settings are reported together."""
        wrong = {"SECRET_KEY": "short", "SECRET_KEY_FALLBACKS": "short", "BODY_TIMEOUT": "0"}

        self.assert_refused(
            ProductionConfig, wrong, "SECRET_KEY is", "SECRET_KEY_FALLBACKS has", "BODY_TIMEOUT"
        )


class TestIssuer(ConfigTestCase):
    """ISSUER and TOKEN_AUDIENCE, and the ENCRYPTION_KEYS that they need."""

    issuer = PRODUCTION | {
        "ISSUER": "https://users.example",
        "ENCRYPTION_KEYS": secrets.token_hex(32),
    }

    def test_good(self) -> None:
        """An https URL is accepted, and http on this machine; the audience is any text."""
        for issuer in (
            "https://users.example",
            "https://users.example:8443/v1",
            "http://localhost:5000",
            "http://127.0.0.1:5000",
            "http://[::1]:5000",
            f"https://users.example/{'x' * 233}",
        ):
            with self.subTest(issuer):
                settings = {"ISSUER": issuer, "TOKEN_AUDIENCE": "shop"}
                config = ProductionConfig.from_environment(self.issuer | settings)

                self.assertEqual((issuer, "shop"), (config.ISSUER, config.TOKEN_AUDIENCE))

    def test_defaults(self) -> None:
        """By default there is no issuer."""
        config = ProductionConfig.from_environment(PRODUCTION)

        self.assertEqual((None, None), (config.ISSUER, config.TOKEN_AUDIENCE))
        self.assertEqual((), config.ENCRYPTION_KEYS)

    def test_refused(self) -> None:
        """Any other ISSUER, and an audience that is too long, are refused with their value."""
        for name, values in {
            "ISSUER": (
                "users.example",
                "//users.example",
                "https://",
                "ftp://users.example",
                "http://users.example",
                "http://localhost.example",
                "https://users.example/",
                "https://users.example/v1/",
                "https://users.example?",
                "https://users.example?tenant=1",
                "https://users.example#",
                "https://users.example#part",
                "https://users.example:port",
                "https://users.example:65536",
                "https://[users.example",
                "https://users.example\n",
                "https://users.example/a path",
                "https://bücher.example",
                "https://user@users.example",
                "https://user:sesame@users.example",
                f"https://users.example/{'x' * 234}",
            ),
            "TOKEN_AUDIENCE": ("x" * 256,),
        }.items():
            for value in values:
                for config in (ProductionConfig, DevelopmentConfig, TestingConfig):
                    with self.subTest(name, value=value, config=config.__name__):
                        environment = self.issuer | {name: value}
                        self.assert_refused(config, environment, f"{name}={value!r}: ")

    def test_encryption_keys_are_required(self) -> None:
        """In production ISSUER needs ENCRYPTION_KEYS."""
        for config in (ProductionConfig, BaseConfig):
            line = self.assert_refused(config, self.issuer | {"ENCRYPTION_KEYS": " "})
            self.assertEqual("Configuration error: ISSUER needs ENCRYPTION_KEYS too", line)

    def test_encryption_keys(self) -> None:
        """Weak, repeated and too many keys, and those of tokens, are refused and not shown."""
        keys = [secrets.token_hex(32) for _ in range(6)]
        fallback = secrets.token_hex(32)
        of_tokens = "a key of SECRET_KEY"
        for text, reason in {
            "changeme": "number 1 is shorter than 32 bytes",
            f"{keys[0]},{'x' * 64}": "number 2 is a well-known or trivial",
            f"{keys[0]},{keys[0]}": "a key in it twice",
            f"{keys[0]}, {keys[1]}": "a blank beside a comma",
            ",".join(keys): "more than 5 keys",
            STRONG_KEY: of_tokens,
            f"{keys[0]},{STRONG_KEY}": of_tokens,
            f"{keys[0]},{fallback}": of_tokens,
        }.items():
            with self.subTest(reason):
                settings = {"ENCRYPTION_KEYS": text, "SECRET_KEY_FALLBACKS": fallback}
                line = self.assert_refused(
                    ProductionConfig, self.issuer | settings, "ENCRYPTION_KEYS", reason
                )
                for key in (*keys, STRONG_KEY, fallback, "changeme", "x" * 64):
                    self.assertNotIn(key, line)

    def test_development(self) -> None:
        """In development there is an encryption key in the instance folder, unless one is given.

        It is the same with an issuer and without one.
        """
        given = {"ENCRYPTION_KEYS": secrets.token_hex(32)}
        config = DevelopmentConfig.from_environment(given)
        self.assertEqual((given["ENCRYPTION_KEYS"],), config.ENCRYPTION_KEYS)
        self.assertFalse((self.instance / "encryption_key").exists())

        for settings in ({}, {"ISSUER": "http://localhost:5000"}, {"REQUIRE_MFA": "all"}):
            with self.subTest(settings):
                config = DevelopmentConfig.from_environment(settings)

                made = (self.instance / "encryption_key").read_text()
                self.assertEqual((made,), config.ENCRYPTION_KEYS)


class TestSecondFactor(ConfigTestCase):
    """REQUIRE_MFA, STEP_UP_SECONDS, and the ENCRYPTION_KEYS that a second factor needs."""

    encrypted = PRODUCTION | {"ENCRYPTION_KEYS": secrets.token_hex(32)}

    def test_defaults(self) -> None:
        """By default no user must have a second factor, and a code serves for five minutes."""
        for config in (ProductionConfig, DevelopmentConfig, TestingConfig):
            with self.subTest(config=config.__name__):
                made = config.from_environment(PRODUCTION)

                self.assertEqual(("none", 300), (made.REQUIRE_MFA, made.STEP_UP_SECONDS))

    def test_good(self) -> None:
        """REQUIRE_MFA is one of three words; a code serves for at most a day, or for no time."""
        for required in ("none", "admins", "all"):
            for seconds in (0, 1, 86_400):
                with self.subTest(required, seconds=seconds):
                    settings = {"REQUIRE_MFA": required, "STEP_UP_SECONDS": str(seconds)}
                    made = ProductionConfig.from_environment(self.encrypted | settings)

                    self.assertEqual((required, seconds), (made.REQUIRE_MFA, made.STEP_UP_SECONDS))

    def test_refused(self) -> None:
        """Any other value is refused with its name, in all environments."""
        for name, values in {
            "REQUIRE_MFA": ("admin", "All", "true", "1", "none "),
            "STEP_UP_SECONDS": ("-1", "86401", "5 minutes", "1.5"),
        }.items():
            for value in values:
                for config in (ProductionConfig, DevelopmentConfig, TestingConfig):
                    with self.subTest(name, value=value, config=config.__name__):
                        environment = self.encrypted | {name: value}
                        self.assert_refused(config, environment, f"{name}={value!r}: ")

    def test_encryption_keys_are_required(self) -> None:
        """In production REQUIRE_MFA needs ENCRYPTION_KEYS, and the refusal is one line."""
        for required in ("admins", "all"):
            for config in (ProductionConfig, BaseConfig):
                with self.subTest(required, config=config.__name__):
                    settings = {"REQUIRE_MFA": required, "ENCRYPTION_KEYS": " "}
                    line = self.assert_refused(config, self.encrypted | settings)

                    reason = "REQUIRE_MFA needs ENCRYPTION_KEYS too"
                    self.assertEqual(f"Configuration error: {reason}", line)
        settings = {"REQUIRE_MFA": "none", "ENCRYPTION_KEYS": ""}
        made = ProductionConfig.from_environment(self.encrypted | settings)
        self.assertEqual((), made.ENCRYPTION_KEYS)

    def test_encryption_keys(self) -> None:
        """ENCRYPTION_KEYS are as strict without an issuer as with one."""
        fallback = secrets.token_hex(32)
        for text, reason in {
            "changeme": "number 1 is shorter than 32 bytes",
            STRONG_KEY: "a key of SECRET_KEY",
            fallback: "a key of SECRET_KEY",
        }.items():
            with self.subTest(reason):
                settings = {"ENCRYPTION_KEYS": text, "SECRET_KEY_FALLBACKS": fallback}
                line = self.assert_refused(
                    ProductionConfig, PRODUCTION | settings, "ENCRYPTION_KEYS", reason
                )

                self.assertNotIn(text, line)
