"""Files of users: which records are read, which are refused, and that no file does harm."""

import io
import json
import tracemalloc
import unittest
from typing import Any

import bcrypt

from project.ops import user_files
from project.ops.user_files import MAX_BYTES, Record

HASHED = "$2b$12$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW"
ADA = {"username": "ada", "email": "ada@example.com", "password_hash": HASHED}
HEADER = b"username,email,password_hash\r\n"
ADA_ROW = f"ada,ada@example.com,{HASHED}\r\n".encode()
JSON_FIELDS = (
    "username, email, password_hash, active, admin, email_verified, roles, created_at,"
    " second_factor"
)


def line(**fields: Any) -> bytes:
    """Return Ada as a line of JSON Lines, with these fields changed or added."""
    return json.dumps(ADA | fields, ensure_ascii=False).encode() + b"\n"


def read(content: bytes, *, as_csv: bool = False) -> list[Record]:
    """Return every record of a file."""
    return list(user_files.read(io.BytesIO(content), as_csv=as_csv))


class Endless(io.RawIOBase):
    """A file of one line with `length` bytes, and then the line `last`."""

    def __init__(self, length: int, last: bytes) -> None:
        self._remaining = length
        self._last = io.BytesIO(b"\n" + last)

    def readable(self) -> bool:
        """Return whether the file can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as io.RawIOBase requires it."""
        if not self._remaining:
            return self._last.readinto(buffer)
        count = min(len(buffer), self._remaining)
        buffer[:count] = b"x" * count
        self._remaining -= count
        return count


class TestRecords(unittest.TestCase):
    """Each line of a file is a user, or is refused with its number and a reason."""

    def assert_refused(self, content: bytes, errors: dict[str, str], as_csv: bool = False) -> None:
        """Check that the last record is refused with exactly these errors."""
        last = read(content, as_csv=as_csv)[-1]

        self.assertIsNone(last.user)
        self.assertEqual(errors, last.errors)

    def test_json(self) -> None:
        """Keys in any order, whitespace, blank lines, both line endings and a BOM are accepted.

        Lines are numbered as in an editor.
        """
        content = b"\xef\xbb\xbf" + line() + b"\n \r\n" + line(active=False).strip() + b"\r\n"
        content += b'{"email":"B@Example.COM", "password_hash":"' + HASHED.encode()
        content += b'", "username" : " \\u0042 ", "created_at": "2001-02-03t04:05:06.789+01:00"}'

        found = read(content)

        self.assertEqual([1, 4, 5], [record.line for record in found])
        self.assertEqual([{}] * 3, [record.errors for record in found])
        users = [record.user for record in found if record.user]
        self.assertEqual(
            [("ada", True), ("ada", False)], [(u.username, u.active) for u in users[:2]]
        )
        self.assertEqual(("B", "b@example.com"), (users[2].username, users[2].email))
        self.assertEqual(
            "2001-02-03T03:05:06.789000+00:00", str(users[2].created_at).replace(" ", "T")
        )
        self.assertEqual(len(content), found[-1].end)

    def test_fields_are_valid(self) -> None:
        """Username and email follow the rules of a registration; types are strict, without null."""
        text = "must be a string"
        flag = "should be a valid boolean"
        moment = "must be a moment like 2026-11-22T09:00:00Z"
        past = "must lie between 1970 and now"
        name = "must have 1 to 128 characters"
        words = (
            "must be different words of at most 31 characters of a-z, 0-9 and _.:- that begin with"
            " a letter"
        )
        for field, value, reason in (
            ("username", None, text),
            ("username", 5, text),
            ("username", "", name),
            ("username", "x" * 129, name),
            ("username", "a\x1b[2Jda", "must not contain control characters"),
            ("username", ["ada"], text),
            ("email", None, text),
            ("email", "ada", "must be an email address"),
            ("email", " ada@example.com", "must be an email address"),
            ("email", "a" * 120 + "@example.com", "must have at most 128 characters"),
            ("active", None, flag),
            ("active", "true", flag),
            ("active", 1, flag),
            ("admin", "yes", flag),
            ("email_verified", None, flag),
            ("roles", None, "should be a valid list"),
            ("roles", "orders", "should be a valid list"),
            ("roles", ["orders", 1], text),
            (
                "roles",
                ["orders", "admin"],
                "must not have admin, which is set with the member admin",
            ),
            ("roles", [f"role{number}" for number in range(17)], "must have at most 16 words"),
            ("roles", ["orders", "orders"], words),
            ("roles", ["Orders"], words),
            ("second_factor", None, text),
            ("second_factor", True, text),
            ("second_factor", ["secret"], text),
            ("second_factor", {"secret": "x"}, text),
            ("created_at", None, moment),
            ("created_at", 0, moment),
            ("created_at", "2026-11-22", moment),
            ("created_at", "2026-11-22T09:00:00", moment),
            ("created_at", "2026-11-22T09:00:00+0100", moment),
            ("created_at", "2026-02-30T09:00:00Z", moment),
            ("created_at", "1969-12-31T23:59:59Z", past),
            ("created_at", "0001-01-01T00:00:00+23:59", past),
            ("created_at", "9999-12-31T23:59:59-23:59", past),
        ):
            with self.subTest(field, value=value):
                self.assert_refused(line(**{field: value}), {field: reason})

    def test_all_errors_of_a_line(self) -> None:
        """The refusal of a line names all invalid fields."""
        errors = {
            "username": "is required",
            "email": "must be an email address",
            "password_hash": "is required",
        }
        self.assert_refused(b'{"email": ""}', errors)

    def test_hashes(self) -> None:
        """Only bcrypt hashes that can be verified, with a cost from 4 to 16, are accepted."""
        malformed = "must be a bcrypt hash of the kind $2a$, $2b$ or $2y$"
        cost = "must have a cost of 4 to 16"
        for text, reason in (
            (HASHED.replace("$2b", "$2x"), malformed),
            (HASHED.replace("$2b", "$2"), malformed),
            (HASHED.upper(), malformed),
            (HASHED[:-1], malformed),
            (HASHED + "W", malformed),
            (HASHED + "\n", malformed),
            (" " + HASHED, malformed),
            (HASHED.replace("r9", "r!"), malformed),
            (HASHED.replace("$12$", "$5$"), malformed),
            (HASHED.replace("$12$", "$١٢$"), malformed),
            (HASHED[:28] + "v" + HASHED[29:], malformed),
            (HASHED[:-1] + "X", malformed),
            ("bcrypt_sha256$" * 2 + HASHED, malformed),
            ("{CRYPT}" + HASHED, malformed),
            ("$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$aGFzaA", malformed),
            ("correct horse", malformed),
            ("", malformed),
            (HASHED.replace("$12$", "$00$"), cost),
            (HASHED.replace("$12$", "$03$"), cost),
            (HASHED.replace("$12$", "$17$"), cost),
            (HASHED.replace("$12$", "$31$"), cost),
            ("bcrypt_sha256$" + HASHED.replace("$12$", "$31$"), cost),
            (None, "must be a string"),
        ):
            with self.subTest(text):
                self.assert_refused(line(password_hash=text), {"password_hash": reason})

    def test_no_genuine_hash_is_refused(self) -> None:
        """All hashes that bcrypt makes are accepted: none has set bits that the rule forbids."""
        for number in range(256):
            for prefix in (b"2a", b"2b"):
                hashed = bcrypt.hashpw(b"%d" % number, bcrypt.gensalt(4, prefix)).decode()
                self.assertEqual({}, read(line(password_hash=hashed))[0].errors, hashed)

    def test_lines_are_refused_one_by_one(self) -> None:
        """An invalid line is refused, and the lines before and after it are read."""
        unknown = f"has a field that is none of {JSON_FIELDS}"
        for text, reason in (
            (line(username="adä").replace(b"\xc3", b""), "is not UTF-8"),
            (line().decode().encode("utf-16"), "is not UTF-8"),
            (b"ada", "is not a JSON object"),
            (b"[]", "is not a JSON object"),
            (b'"ada"', "is not a JSON object"),
            (b"[" * 60_000, "is not a JSON object"),
            (b"9" * 5_000, "is not a JSON object"),
            (line().strip() + b",", "is not a JSON object"),
            (line().strip() * 2, "is not a JSON object"),
            (line(active=True).strip(b"}\n") + b', "active": false}', "has a field twice"),
            (line(actve=False), unknown),
            (line(password="secret"), unknown),
            (b"x" * MAX_BYTES, f"is longer than {MAX_BYTES:,} bytes"),
        ):
            with self.subTest(reason, text=text[:80]):
                content = line() * 4 + text.replace(b"\n", b"") + b"\n" + line()

                found = read(content)

                self.assertEqual([1, 2, 3, 4, 5, 6], [record.line for record in found])
                self.assertEqual([{}] * 4 + [{"it": reason}, {}], [r.errors for r in found])
        surrogate = line().replace(b"ada", b"a\\ud800", 1)
        self.assertEqual(["username"], list(read(surrogate)[0].errors))

    def test_memory_is_bounded(self) -> None:
        """A line of 100 MB is refused without being held in memory."""
        for as_csv in (False, True):
            with self.subTest(as_csv=as_csv):
                file = io.BufferedReader(Endless(100_000_000, line()))
                tracemalloc.start()
                try:
                    found = list(user_files.read(file, as_csv=as_csv))
                    peak = tracemalloc.get_traced_memory()[1]
                finally:
                    tracemalloc.stop()

                self.assertTrue(found[0].errors["it"].startswith("is longer than"))
                self.assertEqual([] if as_csv else [2], [r.line for r in found if r.user])
                self.assertLess(peak, 2_000_000)

    def test_rows_are_bounded(self) -> None:
        """The length of a quoted row that spans many lines is bounded, too."""
        endless = HEADER + b'"' + b"x\n" * MAX_BYTES

        found = read(endless, as_csv=True)

        reason = f"is longer than {MAX_BYTES:,} bytes; nothing after it was read"
        self.assertEqual([(2, {"it": reason})], [(r.line, r.errors) for r in found])

    def test_refusals_repeat_nothing(self) -> None:
        """No refusal contains a hash or a control character from the line."""
        for number, content in enumerate(
            (
                line(**{HASHED: "\x1b[2J"}),
                line(password_hash=HASHED + "\x1b[2J"),
                line(email=HASHED, username=HASHED + "\x07", active=HASHED, created_at=HASHED),
                f'["{HASHED}"'.encode(),
            )
        ):
            for as_csv in (False, True):
                with self.subTest(number, as_csv=as_csv):
                    for record in read(content, as_csv=as_csv):
                        self.assertTrue(record.errors)
                        self.assertNotIn("$2b$12", str(record.errors))
                        self.assertTrue("".join(map("".join, record.errors.items())).isprintable())


class TestCsv(unittest.TestCase):
    """CSV as RFC 4180 defines it."""

    def test_csv(self) -> None:
        """Columns in any order, quotes, a BOM and both line endings are accepted."""
        content = b"\xef\xbb\xbfemail,active,admin,password_hash,username,created_at\r\n"
        content += f'a@x.y,false,true,{HASHED},"Ada, ""the"" first",1970-01-01T00:00:00Z\n'.encode()
        content += f'\n"true@x.y",true,false,"{HASHED}",true,2001-02-03T04:05:06Z'.encode()

        found = read(content, as_csv=True)

        self.assertEqual([(2, {}), (4, {})], [(record.line, record.errors) for record in found])
        users = [record.user for record in found if record.user]
        self.assertEqual(['Ada, "the" first', "true"], [user.username for user in users])
        self.assertEqual([(False, True), (True, False)], [(u.active, u.admin) for u in users])

    def test_roles(self) -> None:
        """Roles are words separated by blanks, with the rules of JSON; an empty field is none."""
        content = b"roles,username,email,password_hash\r\n"
        rows = ("orders.read", "orders.read orders.write", '" x  y "', "", "x x", '"x,y"', "admin")
        for roles in rows:
            content += f"{roles},ada,ada@x.y,{HASHED}\r\n".encode()

        found = read(content, as_csv=True)

        read_roles = [record.user.roles for record in found if record.user]
        expected = [["orders.read"], ["orders.read", "orders.write"], ["x", "y"], []]
        self.assertEqual(expected, read_roles)
        self.assertEqual([["roles"]] * 3, [list(record.errors) for record in found[4:]])

    def test_second_factor(self) -> None:
        """An empty field is no second factor, wherever the column is."""
        for content in (
            f"second_factor,username,email,password_hash\r\n,ada,ada@x.y,{HASHED}\r\n",
            f'username,email,password_hash,second_factor\r\nada,ada@x.y,{HASHED},""\r\n',
        ):
            (found,) = read(content.encode(), as_csv=True)

            self.assertEqual({}, found.errors)
            self.assertIsNone(found.user.second_factor if found.user else "refused")

    def test_rows_are_refused_one_by_one(self) -> None:
        """An invalid row is refused with the number of its first line; the other rows are read."""
        content = b"username,email,password_hash,active\r\n"
        content += f"ada,ada@x.y,{HASHED}\r\n".encode()
        content += f'"a\nb\nc",ada@x.y,{HASHED},true\r\n'.encode()
        content += f"adä,ada@x.y,{HASHED},true\r\n".encode("latin-1")
        content += f"ada,ada@x.y,{HASHED},yes\r\n".encode()
        content += f"ada,ada@x.y,{HASHED},\r\n".encode()
        content += f"ada,ada@x.y,{HASHED},true,true\r\n".encode()
        content += f"ada,ada@x.y,{HASHED},true\r\n".encode()

        found = read(content, as_csv=True)

        fields = {"it": "has not as many fields as the header"}
        flag = {"active": "should be a valid boolean"}
        self.assertEqual(
            [
                (2, fields),
                (3, {"username": "must not contain control characters"}),
                (6, {"it": "is not UTF-8"}),
                (7, flag),
                (8, flag),
                (9, fields),
                (10, {}),
            ],
            [(record.line, record.errors) for record in found],
        )

    def test_header(self) -> None:
        """Nothing is read without a header of all required fields, each once, and no others."""
        reason = (
            "must be the header, which names username, email, password_hash, and no others but"
            " active, admin, email_verified, roles, created_at, second_factor; nothing after it was"
            " read"
        )
        for header in (
            b"",
            b"username,email\r\n",
            b"username,email,password_hash,actve\r\n",
            b"username,email,password_hash,email\r\n",
            b"Username,Email,Password_hash\r\n",
            b"username;email;password_hash\r\n",
            ADA_ROW,
        ):
            with self.subTest(header):
                found = read(header + ADA_ROW if header else b"", as_csv=True)

                self.assertEqual([(1, {"it": reason})], [(r.line, r.errors) for r in found])

    def test_no_user_is_read_from_a_quoted_field(self) -> None:
        """The content of a quoted field never becomes a row, even when its quotes are broken."""
        hidden = f"\nroot,root@x.y,{HASHED}\n"
        for number, row in enumerate(
            (
                f'"x{hidden}",ada@x.y,{HASHED}\n',
                f'"x{hidden}"x,ada@x.y,{HASHED}\n',
                f'"x" {hidden}",ada@x.y,{HASHED}\n',
                f'"x\\"{hidden}",ada@x.y,{HASHED}\n',
                f'"{"x" * MAX_BYTES}{hidden}",ada@x.y,{HASHED}\n',
                f'"{hidden * 1_000}",ada@x.y,{HASHED}\n',
                f'"x{hidden}',
                f"x\r{hidden.strip()}\n",
            )
        ):
            with self.subTest(number):
                found = read(HEADER + ADA_ROW + row.encode() + ADA_ROW, as_csv=True)

                names = [record.user.username for record in found if record.user]
                self.assertEqual({"ada"}, set(names))
                self.assertEqual(3, next(record.line for record in found if record.errors))


class TestWriting(unittest.TestCase):
    """Written files can be read."""

    def test_both_formats(self) -> None:
        """A user with quotes, line separators and emoji is the same after writing and reading."""
        user = ADA | {
            "username": 'Ζωή, "the\u2028first" \\ \N{GRINNING FACE}',
            "active": False,
            "admin": True,
            "email_verified": True,
            "roles": ["orders.read", "orders.write"],
            "created_at": "2001-02-03T04:05:06.000007Z",
        }
        for as_csv in (False, True):
            with self.subTest(as_csv=as_csv):
                file = io.BytesIO()

                self.assertEqual(2, user_files.write([user, user], file, as_csv=as_csv))
                found = read(file.getvalue(), as_csv=as_csv)

                self.assertEqual([{}, {}], [record.errors for record in found])
                back = found[1].user.model_dump() if found[1].user else {}
                self.assertEqual("{CRYPT}" + HASHED, back.pop("password_hash"))
                self.assertEqual(7, back.pop("created_at").microsecond)
                self.assertIsNone(back.pop("second_factor"))
                self.assertEqual(back, {key: user[key] for key in back})

    def test_second_factors(self) -> None:
        """A CSV file has the column on request; it is empty for users without a factor."""
        user = ADA | {
            "active": True,
            "admin": False,
            "email_verified": False,
            "roles": [],
            "created_at": "2001-02-03T04:05:06Z",
        }
        users = [user, user | {"second_factor": "c2VhbGVk"}]
        written = {}
        for with_factors in (False, True):
            for as_csv in (False, True):
                file = io.BytesIO()
                user_files.write(users, file, as_csv=as_csv, with_factors=with_factors)
                written[with_factors, as_csv] = file.getvalue().decode().splitlines()

        self.assertEqual(written[False, False], written[True, False])
        self.assertNotIn("second_factor", written[True, False][0])
        self.assertIn('"second_factor":"c2VhbGVk"', written[True, False][1])
        self.assertNotIn("second_factor", written[False, True][0])
        self.assertEqual(written[False, True][1], written[False, True][2])
        header, without, with_one = written[True, True]
        self.assertEqual(written[False, True][0] + ",second_factor", header)
        self.assertEqual(written[False, True][1] + ",", without)
        self.assertEqual(without + "c2VhbGVk", with_one)
