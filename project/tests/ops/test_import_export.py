"""Import and export: old passwords keep working, imports can be repeated, nothing is lost."""

import base64
import contextlib
import hashlib
import io
import json
import unicodedata
from collections.abc import Iterator
from typing import Any
from unittest import mock

import bcrypt
from flask import current_app
from sqlalchemy import delete, event, select, update

from project import clock, db, errors
from project.accounts import administration
from project.lib import hashing
from project.models import TotpFactor, User
from project.ops import exported_factors, import_export, user_files
from project.ops.exported_factors import Factor
from project.tests.accounts.second_factor_case import STEP, SecondFactorTestCase, stored
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import ORIGIN, add_user, start_session, stored_users
from project.tests.tokens.claims import claims_of

# Hashes of other programs, from their documentation and their tests.
PHP = "rasmuslerdorf", "$2y$07$usesomesillystringfore2uDLvp1Ii2e./U9C8sBjqp8I90dH6hi"
JAVA = "a", "$2a$06$m0CrhHm10qJ3lXRY.5zDGO3rS2KdeeWLuGmsfGlMfOxih58VYVfxe"
LONG = (
    "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 and what is ignored",
    "$2a$05$abcdefghijklmnopqrstuu5s2v8.iXieOjg/.AySBTTZIIVFJeBui",
)
WIDE = "\uff21\uff24\uff21"  # ADA
SALT = b"$2b$04$" + b"." * 22
OURS = r"\A\$2b\$04\$[./A-Za-z0-9]{53}\Z"


def hash_elsewhere(password: str | bytes) -> str:
    """Return the plain bcrypt hash of a password, as other programs store it."""
    sent = password.encode() if isinstance(password, str) else password
    return bcrypt.hashpw(sent, bcrypt.gensalt(4)).decode()


def user(name: str, password_hash: str = PHP[1], **fields: Any) -> dict[str, Any]:
    """Return the fields of a user in a file; the email is derived from the name."""
    return {
        "username": name,
        "email": f"{name}@test.com",
        "password_hash": password_hash,
    } | fields


class ImportExportTestCase(BaseTestCase):
    """A test that imports and exports users."""

    def import_users(
        self, *users: dict[str, Any], file: bytes | None = None
    ) -> tuple[int, int, Any]:
        """Import users, one per line; return how many were added, how many existed, refusals."""
        content = "\n".join(map(json.dumps, users)).encode() if file is None else file
        as_csv = content.startswith(b"username,")
        added = existing = 0
        refused = []
        for batch in import_export.import_users(io.BytesIO(content), as_csv=as_csv):
            db.session.commit()
            added += batch.added
            existing += batch.existing
            refused += [(refusal.line, refusal.errors) for refusal in batch.refused]
        return added, existing, refused

    def export_users(self, *, as_csv: bool = False, with_factors: bool = False) -> bytes:
        """Return the export of all users."""
        file = io.BytesIO()
        users = import_export.export_users(with_factors=with_factors)
        user_files.write(users, file, as_csv=as_csv, with_factors=with_factors)
        return file.getvalue()

    def stored(self, name: str) -> str:
        """Return the stored hash of a user."""
        passwords = {row["username"]: str(row["password"]) for row in stored_users()}
        return passwords[name]

    def erase(self) -> None:
        """Delete every user."""
        db.session.execute(delete(User))
        db.session.commit()


class TestOldPasswords(ImportExportTestCase):
    """Imported users log in with the passwords that they have."""

    def assert_logs_in(self, name: str, password: str) -> None:
        """Check that a user can log in with a password."""
        self.assertEqual(200, self.login(f"{name}@test.com", password).status_code)

    def assert_refused(self, name: str, password: str) -> None:
        """Check that a login with a wrong password has the usual response."""
        self.assert_error(
            self.login(f"{name}@test.com", password),
            errors.InvalidCredentials,
        )

    def test_login_with_the_old_password(self) -> None:
        """A login against the hash of another program succeeds and replaces the hash."""
        here = ("here", hash_elsewhere("here"))
        makers = {"php": PHP, "java": JAVA, "long": LONG, "python": here}
        users = [user(name, hashed) for name, (_, hashed) in makers.items()]
        self.assertEqual((4, 0, []), self.import_users(*users))

        for name, (password, hashed) in makers.items():
            with self.subTest(name):
                self.assertEqual("{CRYPT}" + hashed, self.stored(name))
                self.assert_refused(name, "wrong" + password)
                self.assertEqual("{CRYPT}" + hashed, self.stored(name))

                self.assert_logs_in(name, password)
                self.assertRegex(self.stored(name), OURS)
                self.assert_logs_in(name, password)
                self.assert_refused(name, "wrong" + password)

    def test_expensive_hash_is_replaced_too(self) -> None:
        """An imported hash is replaced even if its cost is higher than the configured one."""
        self.assertLess(current_app.config["BCRYPT_LOG_ROUNDS"], 7)
        self.import_users(user("ada", PHP[1]))

        self.assert_logs_in("ada", PHP[0])

        self.assertRegex(self.stored("ada"), OURS)

    def test_change_of_an_old_password(self) -> None:
        """An imported password can be changed before the first login."""
        self.import_users(user("ada"))
        token = start_session(db.session.scalars(select(User)).one()).auth_token
        for current, status in (("wrong", 400), (PHP[0], 200)):
            response = self.client.post(
                "/auth/password",
                json={"current_password": current, "new_password": "new"},
                headers=bearer(token),
            )
            self.assertEqual(status, response.status_code)

        self.assertRegex(self.stored("ada"), OURS)
        self.assert_logs_in("ada", "new")
        self.assert_refused("ada", PHP[0])

    def test_bytes_that_bcrypt_ignores(self) -> None:
        """The first login compares 72 bytes, as the other program did; later ones compare all."""
        password = "ä" * 36 + "tail"
        self.import_users(user("ada", hash_elsewhere("ä" * 36)))
        self.assert_refused("ada", "ä" * 35 + "a" + "tail")

        self.assert_logs_in("ada", password)

        self.assert_refused("ada", password[:-1])
        self.assert_logs_in("ada", password)

    def test_nul_and_excess_bytes(self) -> None:
        """Passwords with NUL or of more than 1,024 bytes are wrong, though bcrypt accepts them."""
        self.import_users(
            user("nul", hash_elsewhere("secret")), user("long", hash_elsewhere("x" * 72))
        )
        once, twice = (bcrypt.hashpw(p, SALT) for p in (b"secret", b"secret\0secret"))
        self.assertEqual(once, twice)

        self.assert_refused("nul", "secret\0secret")
        self.assert_refused("nul", "secret\0")
        self.assert_refused("long", "x" * 1_025)
        self.assert_logs_in("nul", "secret")
        self.assert_logs_in("long", "x" * 1_024)

    def test_old_passwords_are_not_normalized(self) -> None:
        """The first login compares the bytes as sent; later ones accept any Unicode form."""
        composed, decomposed = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))
        self.import_users(user("ada", hash_elsewhere(decomposed)))
        self.assert_refused("ada", composed)

        self.assert_logs_in("ada", decomposed)

        self.assert_logs_in("ada", composed)

    def test_hash_formats_are_not_confused(self) -> None:
        """Each hash is verified in the way in which it was made, and in no other."""
        digest = hashlib.sha256(b"secret").hexdigest()
        over_digest = hash_elsewhere(digest)
        self.import_users(user("ours", "bcrypt_sha256$" + over_digest), user("theirs", over_digest))

        self.assert_refused("ours", digest)
        self.assert_refused("theirs", "secret")
        self.assert_logs_in("ours", "secret")
        self.assert_logs_in("theirs", digest)
        self.assertEqual(over_digest, self.stored("ours"))

    def test_active_and_admin(self) -> None:
        """A deactivated user cannot log in after the import, and an admin is an admin."""
        self.import_users(user("ada", active=False), user("root", admin=True))

        self.assertEqual(401, self.login("ada@test.com", PHP[0]).status_code)
        self.assert_logs_in("root", PHP[0])
        rows = {row["username"]: (row["active"], row["admin"]) for row in stored_users()}
        self.assertEqual({"ada": (False, False), "root": (True, True)}, rows)


class TestImport(ImportExportTestCase):
    """The outcome for each line."""

    def test_email_verified(self) -> None:
        """`email_verified` is false if the file does not have it, and is compared if it does."""
        self.import_users(user("ada"), user("eve", email_verified=True))
        header = b"username,email,password_hash,email_verified\r\n"
        row = f"{{0}},{{0}}@test.com,{PHP[1]},{{1}}\r\n"
        rows = row.format("kim", "true") + row.format("joe", "false") + row.format("bad", "1")
        refused = [(4, {"email_verified": "should be a valid boolean"})]

        self.assertEqual((2, 0, refused), self.import_users(file=header + rows.encode()))

        stored = {row["username"]: row["email_verified"] for row in stored_users()}
        self.assertEqual({"ada": False, "eve": True, "kim": True, "joe": False}, stored)
        again = user("ada"), user("eve"), user("ada", email_verified=True)
        refused = [(3, {"it": "is there already, with another email_verified"})]
        self.assertEqual((0, 2, refused), self.import_users(*again))

    def test_roles(self) -> None:
        """Without the field, users have no roles; with it, roles are compared in any order."""
        self.import_users(user("ada"), user("eve", roles=["orders.read", "orders.write"]))
        header = b"username,email,password_hash,roles\r\n"
        row = f"{{0}},{{0}}@test.com,{PHP[1]},{{1}}\r\n"
        rows = row.format("kim", "orders.read x") + row.format("joe", "")
        self.assertEqual((2, 0, []), self.import_users(file=header + rows.encode()))

        stored = {row["username"]: row["roles"] for row in stored_users()}
        eve, kim = ["orders.read", "orders.write"], ["orders.read", "x"]
        self.assertEqual({"ada": [], "eve": eve, "kim": kim, "joe": []}, stored)
        refused = {"it": "is there already, with another roles"}
        outcome = self.import_users(
            user("eve"),
            user("eve", roles=eve),
            user("ada", roles=[]),
            user("eve", roles=eve[::-1]),
            user("eve", roles=[]),
            user("ada", roles=["x"]),
        )
        self.assertEqual((0, 4, [(number, refused) for number in (5, 6)]), outcome)
        self.assertEqual((0, 2, []), self.import_users(file=header + rows.encode()))

    def test_login_of_unverified(self) -> None:
        """Where emails have to be confirmed, `email_verified` decides who can log in."""
        self.app.config["EMAIL_VERIFICATION"] = "required"
        self.import_users(user("ada"), user("eve", email_verified=True))

        self.assert_error(self.login("ada@test.com", PHP[0]), errors.EmailUnverified)
        self.assertEqual(200, self.login("eve@test.com", PHP[0]).status_code)

    def test_what_is_stored(self) -> None:
        """An imported user is stored as if registered here, at the time that the file has."""
        moment = "2001-02-03T04:05:06.789Z"
        self.import_users(user(WIDE, email="Ada@Test.COM", created_at=moment), user("new"))

        ada, new = stored_users()
        self.assertEqual((WIDE, "ada"), (ada["username"], ada["username_key"]))
        self.assertEqual("ada@test.com", ada["email"])
        self.assertEqual("2001-02-03 04:05:06.789000+00:00", str(ada["created_at"]))
        self.assertLess((clock.utcnow() - new["created_at"]).total_seconds(), 60)
        listed = self.get("/users").get_json()["data"]["users"]
        self.assertEqual(["new", WIDE], [each["username"] for each in listed])
        self.assertEqual("2001-02-03T04:05:06Z", listed[1]["created_at"])

    def test_taken_names(self) -> None:
        """A taken email or username is refused, whether the database or an earlier line has it."""
        add_user("Ada", "ada@test.com", "test")
        email, username = {"email": "is taken"}, {"username": "is taken"}

        outcome = self.import_users(
            user("other", email="ADA@test.com"),
            user("ADA", email="other@test.com"),
            user("new"),
            user("else", email="new@test.com"),
            user("NEW", email="else@test.com"),
            user("new2"),
            {"username": "bad"},
        )

        refused = [
            (1, email),
            (2, username),
            (4, email),
            (5, username),
            (7, {"email": "is required", "password_hash": "is required"}),
        ]
        self.assertEqual((2, 0, refused), outcome)
        names = [row["username"] for row in stored_users()]
        self.assertEqual(["Ada", "new", "new2"], names)

    def test_two_lines_with_one_email(self) -> None:
        """Of two lines with one email, the one whose username is free is added."""
        add_user("taken", "taken@test.com", "test")

        outcome = self.import_users(
            user("taken", email="ada@test.com"), user("ada", active=False), user("ada")
        )

        refused = {"username": "is taken", "email": "is taken"}
        self.assertEqual((1, 1, [(1, refused)]), outcome)
        outcome = self.import_users(user("ada", active=True))
        refused = {"it": "is there already, with another active"}
        self.assertEqual((0, 0, [(1, refused)]), outcome)

    def test_repeated_import(self) -> None:
        """A repeated import changes nothing, uses no ids, and names the fields that differ."""
        users = [
            user("ada", created_at="2001-02-03T04:05:06Z"),
            user("eve", JAVA[1], active=True),
            user("kim", "bcrypt_sha256$" + JAVA[1]),
        ]
        self.assertEqual((3, 0, []), self.import_users(*users))
        before = stored_users()
        self.move_clock(60)

        self.assertEqual((0, 3, []), self.import_users(*users))
        self.assertEqual((0, 6, []), self.import_users(*users, *users))
        self.assertEqual(before, stored_users())
        self.assertEqual(before[-1]["id"] + 1, add_user("new", "new@test.com", "new").id)

        self.assertEqual(200, self.login("ada@test.com", PHP[0]).status_code)
        administration.set_active("eve@test.com", False, ORIGIN)
        db.session.commit()
        outcome = self.import_users(
            *users,
            users[0] | {"username": "Ada", "created_at": "2001-02-03T04:05:07Z"},
            users[1] | {"password_hash": PHP[1], "admin": True},
            users[2] | {"password_hash": "bcrypt_sha256$" + PHP[1]},
        )

        refused = [
            (2, "active"),
            (4, "username, created_at"),
            (5, "password_hash, active, admin"),
            (6, "password_hash"),
        ]
        self.assertEqual((0, 2), outcome[:2])
        self.assertEqual(
            [(line, {"it": f"is there already, with another {names}"}) for line, names in refused],
            outcome[2],
        )
        self.assertEqual([False], [r["active"] for r in stored_users() if r["username"] == "eve"])

    def test_whole_batches(self) -> None:
        """Batches committed before an interrupt stay; a second run adds the rest."""
        size = import_export.BATCH
        lines = [json.dumps(user(f"user-{number}")).encode() + b"\n" for number in range(2 * size)]

        def interrupted() -> Iterator[bytes]:
            yield from lines[: size + 5]
            raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt):
            for _ in import_export.import_users(Lines(interrupted()), as_csv=False):
                db.session.commit()
        db.session.rollback()

        self.assertEqual(size, len(stored_users()))
        self.assertEqual((size, size, []), self.import_users(file=b"".join(lines)))
        names = [row["username"] for row in stored_users()]
        self.assertEqual([f"user-{number}" for number in range(2 * size)], names)

    def test_csv_and_json_alike(self) -> None:
        """A user in CSV equals the same user in JSON."""
        row = f"Ada,ada@test.com,{PHP[1]},true,false,2001-02-03T04:05:06Z\r\n"
        header = "username,email,password_hash,active,admin,created_at\r\n"
        self.assertEqual((1, 0, []), self.import_users(file=(header + row).encode()))

        in_json = user("Ada", email="ada@test.com", active=True, admin=False)
        self.assertEqual(
            (0, 1, []), self.import_users(in_json | {"created_at": "2001-02-03T04:05:06Z"})
        )


class Lines(io.BytesIO):
    """A file whose lines come from an iterator."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        super().__init__()
        self._lines = lines

    def readline(self, _size: int | None = -1, /) -> bytes:
        """Return the next line."""
        return next(self._lines, b"")


class TestExport(ImportExportTestCase):
    """The exported file."""

    def test_round_trip(self) -> None:
        """Export, import into an empty database, and export again give the same bytes."""
        add_user('Ζωή, the "first"', "zoe@test.com", "secret", admin=True)
        self.import_users(
            user("php", PHP[1], created_at="2001-02-03T04:05:06.000007Z"),
            user("java", JAVA[1], active=False, email_verified=True, roles=["b.read", "a"]),
            user("here", hash_elsewhere("here")),
        )
        self.login("here@test.com", "here")
        for as_csv in (False, True):
            with self.subTest(as_csv=as_csv):
                before = stored_users()
                written = self.export_users(as_csv=as_csv)
                self.erase()

                self.assertEqual((4, 0, []), self.import_users(file=written))

                self.assertEqual(written, self.export_users(as_csv=as_csv))
                for row, old in zip(stored_users(), before, strict=True):
                    self.assertEqual(old, row | {"id": old["id"]})
        for email, password in (("zoe", "secret"), ("php", PHP[0]), ("here", "here")):
            self.assertEqual(200, self.login(f"{email}@test.com", password).status_code)

    def test_formats(self) -> None:
        """An imported hash is exported unchanged, one of this service with its prefix."""
        self.import_users(user("php", PHP[1], created_at="2001-02-03T04:05:06Z"))
        hashed = add_user("ours", "ours@test.com", "secret").password

        php, ours = map(json.loads, self.export_users().splitlines())
        others = {"active": True, "admin": False, "email_verified": False, "roles": []}
        self.assertEqual(user("php", PHP[1], created_at="2001-02-03T04:05:06Z", **others), php)
        self.assertEqual("bcrypt_sha256$" + hashed, ours["password_hash"])
        header = "username,email,password_hash,active,admin,email_verified,roles,created_at\r\n"
        row = f"php,php@test.com,{PHP[1]},true,false,false,,2001-02-03T04:05:06Z\r\n"
        self.assertTrue(self.export_users(as_csv=True).decode().startswith(header + row))
        self.erase()
        self.assertEqual(b"", self.export_users())
        self.assertEqual(1, len(self.export_users(as_csv=True).splitlines()))

    def test_snapshot(self) -> None:
        """Users who are added or changed during an export are not part of it."""
        self.import_users(*(user(f"user-{number}") for number in range(5_000)))
        users = import_export.export_users()
        first = next(users)
        add_user("late", "late@test.com", "test")
        administration.set_active("user-4999@test.com", False, ORIGIN)
        db.session.commit()

        written = [first, *users]

        self.assertEqual(5_000, len(written))
        self.assertEqual(("user-4999", True), (written[-1]["username"], written[-1]["active"]))


class FactorsTestCase(ImportExportTestCase, SecondFactorTestCase):
    """A test with `ada`, who has an authenticator, and `bob`, who has none."""

    def setUp(self) -> None:
        """Set the authenticator up."""
        super().setUp()
        self.enrol()

    def exported(self) -> dict[str, dict[str, Any]]:
        """Return the users in an export with second factors, by their names."""
        lines = self.export_users(with_factors=True).splitlines()
        users = [json.loads(line) for line in lines]
        return {each["username"]: each for each in users}

    def state_of(self, name: str) -> dict[str, Any]:
        """Return what is stored of a second factor, except for the encrypted secret."""
        user_id = next(row["id"] for row in stored_users() if row["username"] == name)
        tables = stored()
        factors = [row for row in tables["totp_factors"] if row["user_id"] == user_id]
        hashes = [row for row in tables["recovery_codes"] if row["user_id"] == user_id]
        return {
            "factors": [row["email_verified"] for row in factors],
            "hashes": {row["code_hash"] for row in hashes},
        }

    def assert_refused(self, line: dict[str, Any], **expected: str) -> None:
        """Check that a line is refused with these errors, and changes nothing."""
        before = stored()
        self.assertEqual((0, 0, [(1, expected)]), self.import_users(line))
        self.assertEqual(before, stored())


CANNOT_BE_DECRYPTED = "cannot be decrypted with ENCRYPTION_KEYS for this email"


class TestSecondFactors(FactorsTestCase):
    """Second factors in a file."""

    def test_round_trip(self) -> None:
        """Imported users log in with the authenticator and the recovery codes that they have."""
        for number, as_csv in enumerate((False, True)):
            with self.subTest(as_csv=as_csv):
                if number:
                    self.start_again()
                self.round_trip(as_csv)

    def start_again(self) -> None:
        """Begin with the users of `setUp` again."""
        self.erase()
        for name in ("ada", "bob"):
            self.add(name)
        self.enrol()

    def round_trip(self, as_csv: bool) -> None:
        """Export the users, import them with other IDs, and log in."""
        self.add("cho", email_verified=True)
        self.enrol("cho")
        used, recovery = self.code(), self.recovery_codes["ada"]
        self.ok(self.log_in(code=used))
        self.ok(self.log_in(code=recovery[0]))
        before = {name: self.state_of(name) for name in ("ada", "bob", "cho")}
        self.assertEqual([[False], [], [True]], [each["factors"] for each in before.values()])
        written = self.export_users(as_csv=as_csv, with_factors=True)
        for name in ("ada", "bob", "cho"):
            self.assertNotIn(self.secrets.get(name, "none").encode(), written)
        self.erase()
        add_user("other", "other@test.com", "test")

        self.assertEqual((3, 0, []), self.import_users(file=written))

        self.assertEqual(before, {name: self.state_of(name) for name in before})
        ids = {row["username"]: row["id"] for row in stored_users()}
        self.assertNotEqual(self.ids["ada"], ids["ada"])
        self.ok(self.log_in("bob"))
        for name in ("ada", "cho"):
            self.assert_error(self.log_in(name), errors.MfaRequired)
            for code in (self.code(name, -1), self.code(name), recovery[0]):
                self.assert_wrong(self.log_in(name, code=code))
        self.move_clock(STEP)
        for name in ("ada", "cho"):
            token = self.ok(self.log_in(name, code=self.code(name)))["auth_token"]
            self.assertEqual(["pwd", "otp"], claims_of(token)["amr"])
        self.ok(self.log_in(code=recovery[1]))
        self.assert_wrong(self.log_in("cho", code=recovery[2]))
        self.assertEqual((0, 3, []), self.import_users(file=written))

    def test_all_recovery_codes_used(self) -> None:
        """A user without recovery codes is exported and imported, too; so is a deactivated one."""
        for code in self.recovery_codes["ada"]:
            self.ok(self.log_in(code=code))
        administration.set_active("ada@test.com", False, ORIGIN)
        db.session.commit()
        written = self.export_users(with_factors=True)
        self.erase()

        self.assertEqual((2, 0, []), self.import_users(file=written))

        self.assertEqual({"factors": [False], "hashes": set()}, self.state_of("ada"))
        administration.set_active("ada@test.com", True, ORIGIN)
        db.session.commit()
        self.assert_error(self.log_in(), errors.MfaRequired)
        self.move_clock(STEP)
        self.ok(self.log_in(code=self.code()))

    def test_without_the_option(self) -> None:
        """No factor is written, and users who are imported from such a file have none."""
        written = self.export_users()
        self.assertNotIn(b"second_factor", written)
        self.assertNotIn("second_factor", self.exported()["bob"])
        self.assertEqual((0, 2, []), self.import_users(file=written))
        self.erase()

        self.assertEqual((2, 0, []), self.import_users(file=written))

        token = self.ok(self.log_in())["auth_token"]
        self.assertEqual(["pwd"], claims_of(token)["amr"])

    def test_pending(self) -> None:
        """A secret that was not confirmed is not exported, and is no factor of an existing user."""
        ada = self.exported()["ada"]
        self.ok(self.turn_off())
        self.begin()

        without = {name: value for name, value in ada.items() if name != "second_factor"}
        self.assertEqual(without, self.exported()["ada"])
        self.assertEqual(0, import_export.users_with_factor())
        self.assertEqual((0, 1, []), self.import_users(without))
        self.assert_refused(ada, it="is there already, with another second_factor")

    def test_existing_users(self) -> None:
        """The same authenticator is there already, whatever codes are left; another one is not."""
        ada = self.exported()["ada"]
        self.ok(self.log_in(code=self.recovery_codes["ada"][0]))
        self.ok(self.log_in(code=self.code()))
        self.ok(self.replace_recovery_codes())
        self.assertEqual((0, 2, []), self.import_users(ada, ada))
        self.assertNotEqual(ada["second_factor"], self.exported()["ada"]["second_factor"])

        different = {"it": "is there already, with another second_factor"}
        self.ok(self.turn_off())
        self.assert_refused(ada, **different)
        self.move_clock(STEP)
        self.enrol()
        self.assert_refused(ada, **different)
        self.assert_refused(
            ada | {"active": False}, it="is there already, with another active, second_factor"
        )

    def test_added_twice(self) -> None:
        """Of two lines with one user in a file, the first is added with its factor."""
        ada = self.exported()["ada"]
        self.ok(self.turn_off())
        self.move_clock(STEP)
        self.enrol()
        another = self.exported()["ada"]
        self.erase()

        refused = {"it": "is there already, with another second_factor"}
        self.assertEqual((1, 1, [(3, refused)]), self.import_users(another, another, ada))

        self.move_clock(STEP)
        self.ok(self.log_in(code=self.code()))

    def test_wrong_keys(self) -> None:
        """A factor that no key decrypts is refused with its line; the other lines are imported."""
        users = self.exported()
        self.erase()
        for keys in ((), ("another" * 8,)):
            with self.subTest(keys), mock.patch.dict(self.app.config, ENCRYPTION_KEYS=keys):
                self.assert_refused(users["ada"], second_factor=CANNOT_BE_DECRYPTED)
        with mock.patch.dict(self.app.config, ENCRYPTION_KEYS=("another" * 8,)):
            refused = [(1, {"second_factor": CANNOT_BE_DECRYPTED})]
            outcome = self.import_users(users["ada"], users["bob"])
            self.assertEqual((1, 0, refused), outcome)
        keys = "another" * 8, *self.app.config["ENCRYPTION_KEYS"]
        with mock.patch.dict(self.app.config, ENCRYPTION_KEYS=keys):
            self.assertEqual((1, 1, []), self.import_users(users["ada"], users["bob"]))
        with mock.patch.dict(self.app.config, ENCRYPTION_KEYS=keys[:1]):
            # The secret is stored under the first key.
            self.move_clock(STEP)
            self.ok(self.log_in(code=self.code()))

    def test_ill_formed(self) -> None:
        """What was not exported is refused, and its content is not repeated."""
        ada = self.exported()["ada"]
        sealed = ada["second_factor"]
        self.erase()
        for text in (
            "",
            "x",
            sealed[:-4],
            sealed[4:],
            sealed + "AAAA",
            sealed.lower(),
            f" {sealed}",
            sealed.replace("=", "") + "é",
            base64.b64encode(bytes(64)).decode(),
            "A" * 60_000,
            "\x1b[2J",
        ):
            with self.subTest(text[:80]):
                line = ada | {"second_factor": text}
                self.assert_refused(line, second_factor=CANNOT_BE_DECRYPTED)
        for value in (None, 1, ["x"], {"secret": self.secrets["ada"]}):
            with self.subTest(value):
                line = ada | {"second_factor": value}
                self.assert_refused(line, second_factor="must be a string")
        self.assert_refused(
            ada | {"email": "none"},
            email="must be an email address",
            second_factor=CANNOT_BE_DECRYPTED,
        )

    def test_unreadable(self) -> None:
        """An export with a secret that no key decrypts fails, and so does a comparison with it."""
        ada = self.exported()["ada"]
        db.session.execute(update(TotpFactor).values(secret=b"x"))
        db.session.commit()

        with self.assertRaises(errors.MfaNotConfigured):
            self.export_users(with_factors=True)
        self.assertEqual(2, len(self.export_users().splitlines()))
        before = stored()
        with self.assertRaises(errors.MfaNotConfigured):
            self.import_users({**user("new")}, ada)
        db.session.rollback()
        self.assertEqual(before, stored())

    def test_statements(self) -> None:
        """The number of statements does not depend on the number of users."""
        sealed = Factor(self.secrets["ada"], True, [f"{each:064}" for each in range(10)])
        counts: dict[str, list[int]] = {"import": [], "repeated": [], "export": []}
        for number in (2, 40):
            self.erase()
            lines = []
            for each in range(number):
                one = user(f"user-{each}")
                lines.append(one | {"second_factor": exported_factors.seal(sealed, one["email"])})
            with self.counted_statements() as count:
                self.assertEqual((number, 0, []), self.import_users(*lines))
            counts["import"].append(len(count))
            with self.counted_statements() as count:
                self.assertEqual((0, number, []), self.import_users(*lines))
            counts["repeated"].append(len(count))
            with self.counted_statements() as count:
                self.assertEqual(number, len(self.export_users(with_factors=True).splitlines()))
            counts["export"].append(len(count))
            self.assertEqual(10 * number, len(stored()["recovery_codes"]))

        for name, (few, many) in counts.items():
            self.assertEqual(few, many, name)
        self.assertLessEqual(counts["export"][0], 2)

    @contextlib.contextmanager
    def counted_statements(self) -> Iterator[list[str]]:
        """Collect the statements that are sent in the block."""
        sent: list[str] = []

        def keep(*arguments: Any) -> None:
            sent.append(str(arguments[2]))

        for engine in db.engines.values():
            event.listen(engine, "before_cursor_execute", keep)
        try:
            yield sent
        finally:
            for engine in db.engines.values():
                event.remove(engine, "before_cursor_execute", keep)

    def test_snapshot(self) -> None:
        """An export is read from the database bit by bit; what changes meanwhile is not in it."""
        users = import_export.export_users(with_factors=True)
        first = next(users)
        self.ok(self.turn_off())

        written = [first, *users]

        self.assertEqual(["ada", "bob"], [each["username"] for each in written])
        self.assertIn("second_factor", written[0])


class TestPasswordsOfFiles(BaseTestCase):
    """The prefix that tells imported hashes from those of this service."""

    def test_prefix(self) -> None:
        """Import and export are inverse, and the two formats are stored differently."""
        for text in (PHP[1], JAVA[1], "bcrypt_sha256$" + JAVA[1]):
            self.assertEqual(text, hashing.export_hash(hashing.import_hash(text)))
        stored = hashing.import_hash(JAVA[1])
        self.assertNotEqual(stored, hashing.import_hash("bcrypt_sha256$" + JAVA[1]))
        self.assertTrue(hashing.needs_rehash(stored))
