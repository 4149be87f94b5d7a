"""Valid usernames, emails and passwords, up to the limit of each rule."""

import unicodedata

from project import errors
from project.tests.contract.cases import NEW_USER_ROUTES, SECRET, USER, InputTestCase
from project.tests.rows import stored_users

WITH_CREDENTIALS = [*NEW_USER_ROUTES, "/auth/login"]


class TestUsernames(InputTestCase):
    """A username has 1 to 128 characters, none of them a control character."""

    def test_valid(self) -> None:
        """Any script and inner blanks are valid, up to 128 characters, and are kept as written."""
        scripts = ["日本語", "Straße", "\ufb01sh", "Ⅷ", "¨", "\u200dx", "🦀" * 128, "ж" * 128]
        latin = ["x", "x" * 128, "a b", "JustATest", "<b>&amp;", "'; DROP TABLE users; --", "%s{0}"]
        for number, username in enumerate([*scripts, *latin, "null", "0"]):
            with self.subTest(username):
                user = self.assert_registered(username=username, email=f"{number}@test.com")

                self.assertEqual(username, user["username"])
                shown = self.get(f"/users/{user['id']}").get_json()["data"]["username"]
                self.assertEqual(username, shown)

    def test_length_is_measured_after_nfkc(self) -> None:
        """The 128 characters are counted after NFKC normalization."""
        for path, letter in zip(NEW_USER_ROUTES, ("é", "が"), strict=True):
            with self.subTest(path):
                typed = unicodedata.normalize("NFD", letter) * 128
                body = USER | {"username": typed, "email": f"test@{path[-5:]}.com"}

                response = self.client.post(path, json=body)

                self.assertEqual(201, response.status_code, response.get_data(as_text=True))
                stored = stored_users()[-1]["username"]
                self.assertEqual(letter * 128, unicodedata.normalize("NFKC", stored))

    def test_invalid(self) -> None:
        """Empty names, blanks alone and 129 characters after NFKC are refused."""
        blanks = ["", " ", "   ", "\u3000", "\u00a0\u2003", "\u2028"]
        long = ["x" * 129, "🦀" * 129, "ﬀ" * 65, "ﷺ" * 8, "e\u0301" * 129, "x" * 60_000]
        for username in [*blanks, *long]:
            for path in NEW_USER_ROUTES:
                with self.subTest(username[:10], path=path):
                    self.assert_refused(path, {"username"}, json=USER | {"username": username})

    def test_control_characters(self) -> None:
        """Each of the 65 control characters is refused."""
        for code in [*range(32), *range(127, 160)]:
            with self.subTest(hex(code)):
                body = USER | {"username": f"a{chr(code)}b"}
                self.assert_refused("/auth/register", {"username"}, json=body)
        for path in NEW_USER_ROUTES:
            self.assert_refused(path, {"username"}, json=USER | {"username": "\0"})

    def test_trimmed(self) -> None:
        """Blanks around a username are removed before its length is measured."""
        for number, blank in enumerate([" ", "   ", "\u3000", "\u00a0"]):
            with self.subTest(hex(ord(blank[0]))):
                name = str(number) * 128
                user = self.assert_registered(
                    username=f"{blank}{name}{blank}", email=f"{number}@test.com"
                )

                self.assertEqual(name, user["username"])

    def test_unique_without_case(self) -> None:
        """Names that differ only in case, Unicode form or outer blanks are the same name."""
        nfd = unicodedata.normalize("NFD", "Ångström Οὖτις").split()
        pairs = {
            "Bob": ["bOB", "Bob", " bob ", "\uff22\uff2f\uff22", "\U0001d41bob"],
            "Straße": ["STRASSE", "STRAẞE", "straße"],
            "Ångström": ["ÅNGSTRÖM", nfd[0], nfd[0].lower(), "\u212bngström"],
            "\ufb01sh": ["FISH", "fish"],
            "Ⅷ": ["VIII", "ⅷ"],
            "ΣΊΣΥΦΟΣ": ["σίσυφος", "σίσυφοσ"],
            "Οὖτις": [nfd[1], nfd[1].upper()],
            "\u01c6": ["\u01c4", "\u01c5", "dž"],
            "\u1fb3": ["\u1fbc", "\u03b1\u03b9"],
            "\u00a8x": ["\u0308x"],
        }
        for number, (first, others) in enumerate(pairs.items()):
            self.assert_registered(username=first, email=f"{number}@test.com")
            for other in others:
                with self.subTest(first, other=other):
                    body = USER | {"username": other, "email": "other@test.com"}
                    refused = self.client.post("/auth/register", json=body)

                    self.assert_error(refused, errors.UserExists)
                    added = self.client.post("/users", json=body)
                    self.assert_error(added, errors.UsernameExists)

    def test_different_names(self) -> None:
        """Names that differ in more than that are different names."""
        for number, username in enumerate(["bob", "böb", "b0b", "b.ob", "b ob", "bob2", "ь", "b"]):
            with self.subTest(username):
                self.assert_registered(username=username, email=f"{number}@test.com")


class TestEmails(InputTestCase):
    """A valid email is one that HTML's email field accepts, in ASCII, of up to 128 characters."""

    LONGEST = "x" * 64 + "@" + "y" * 59 + ".com"

    def test_valid(self) -> None:
        """The pattern is HTML's, and no stricter."""
        self.assertEqual(128, len(self.LONGEST))
        odd = [
            "a@b",
            "1@2",
            ".a.@b",
            "a..b@c.de",
            "!#$%&'*+/=?^_`{|}~-@b.c",
            "a@1.2.3.4",
            "a@b--c.d",
        ]
        labels = [f"a@{'x' * 63}", f"a@{'x' * 62}.{'y' * 60}"]
        usual = ["test@test.com2", "a+tag@example.org", "a@localhost", "a@xn--bcher-kva.de"]
        for number, email in enumerate([*usual, *odd, *labels, self.LONGEST]):
            with self.subTest(email):
                user = self.assert_registered(username=f"user{number}", email=email)

                self.assertEqual(email, user["email"])
                self.assertEqual(200, self.login(email, SECRET).status_code)

    def test_invalid(self) -> None:
        """Every other text is refused, at login too."""
        parts = [
            "a",
            "@",
            "@b",
            "a@",
            "a@b@c",
            "a@.",
            "a@.b",
            "a@b.",
            "a@b..c",
            "a@-b",
            "a@b-",
            "a@b.-c",
            "a@b-.c",
            "a@b_c",
        ]
        labels = ["", f"a@{'x' * 64}", f"a@b.{'x' * 64}.c"]
        blanks = [
            " a@b.c",
            "a@b.c ",
            "a b@c.d",
            "a@b .c",
            "a@b.c\n",
            "\na@b.c",
            "\ta@b.c",
            "a@b.c\r",
        ]
        control = [
            "a\0@b.c",
            "a@b.c\0",
            "a@b\0.c",
            "a\x7f@b.c",
            "a@b.c\x85",
            "\xa0a@b.c",
            "a\u200b@b",
        ]
        unicode = [
            "ä@b.c",
            "a@bücher.de",
            "a@例え.jp",
            "a\uff20b.c",
            "\u212a@b.c",
            "\u017f@b.c",
            "a@b。c",
            "a@\uff11.c",
        ]
        quoting = [
            '"a"@b.c',
            "a(b)@c.d",
            "a,b@c.d",
            "Bob<a@b.c>",
            "<a@b.c>",
            "a@[127.0.0.1]",
            "a:b@c",
            "a;b@c",
        ]
        long = [f"x{self.LONGEST}", f"{'x' * 127}@y", f"{'x' * 50_000}@y.z", "@" * 50_000]
        for email in [*parts, *labels, *blanks, *control, *unicode, *quoting, *long]:
            for path in WITH_CREDENTIALS:
                with self.subTest(email[:30], path=path):
                    self.assert_refused(path, {"email"}, json=USER | {"email": email})

    def test_case(self) -> None:
        """An email is stored in lower case and compared without regard to case."""
        user = self.assert_registered(email="Test@Test.COM")

        self.assertEqual("test@test.com", user["email"])
        for email in ("test@test.com", "TEST@TEST.COM", "tEST@test.com"):
            with self.subTest(email):
                body = USER | {"username": "another", "email": email}
                self.assertEqual(200, self.login(email, SECRET).status_code)
                again = self.client.post("/auth/register", json=body)
                self.assert_error(again, errors.UserExists)
                added = self.client.post("/users", json=body)
                self.assert_error(added, errors.EmailExists)


class TestPasswords(InputTestCase):
    """A password is any text of 1 to 1,024 bytes, and every byte counts."""

    def assert_only(self, password: str, *others: str) -> None:
        """Check that a new user logs in with this password and with none of the others."""
        known = len(stored_users())
        email = f"{known}@test.com"
        self.assert_registered(username=f"user{known}", email=email, password=password)

        self.assertEqual(200, self.login(email, password).status_code)
        for other in others:
            with self.subTest(password[:10], other=other[:10], length=len(other)):
                refused = self.login(email, other)
                self.assert_error(refused, errors.InvalidCredentials)

    def test_every_byte_counts(self) -> None:
        """Bytes past the 72nd and past a NUL count, and so do blanks and case."""
        self.assert_only("x" * 80, "x" * 79, "x" * 81, "x" * 72, "x" * 79 + "y", "x" * 72 + "y" * 8)
        self.assert_only("x" * 71 + "é", "x" * 71 + "è", "x" * 71)
        self.assert_only("a\0b", "a\0c", "a", "a\0", "ab", "a\0b\0")
        self.assert_only("\0", "\0\0", "0")
        self.assert_only(" pass word ", "pass word", " pass word", "password", " Pass word ")
        self.assert_only(" ", "  ", "\t", "\u00a0")
        self.assert_only("\n", "\r", "\r\n")

    def test_normalized(self) -> None:
        """Composed and decomposed letters are the same password; ligatures and letters are not."""
        email = "nfc@test.com"
        self.assert_registered(username="nfc", email=email, password="Ame\u0301lie")
        for password in ("Amélie", unicodedata.normalize("NFD", "Amélie")):
            self.assertEqual(200, self.login(email, password).status_code)
        self.assert_only("\ufb01sh", "fish")
        self.assert_only("Ⅷ", "VIII")

    def test_longest(self) -> None:
        """1,024 bytes are accepted, and the last of them counts."""
        self.assert_only("x" * 1_024, "x" * 1_023, "x" * 1_023 + "y", "x" * 1_025, "x" * 60_000)
        self.assert_only("é" * 512, "é" * 511, "é" * 513, "é" * 511 + "e")
        self.assert_only("🦀" * 256, "🦀" * 255, "🦀" * 257)

    def test_too_long(self) -> None:
        """1,025 bytes are refused for a new user, and are a wrong password at a login."""
        self.assert_registered()
        for password in ("x" * 1_025, "é" * 512 + "x", "🦀" * 257, SECRET * 2_000):
            for path in NEW_USER_ROUTES:
                with self.subTest(path, password=password[:10]):
                    self.assert_refused(path, {"password"}, json=USER | {"password": password})
            for email in ("test@test.com", "nobody@test.com"):
                refused = self.login(email, password)
                self.assert_error(refused, errors.InvalidCredentials)

    def test_empty(self) -> None:
        """An empty password is refused, at login too."""
        for path in WITH_CREDENTIALS:
            with self.subTest(path):
                self.assert_refused(path, {"password"}, json=USER | {"password": ""})
