"""The codes of authenticators (RFC 6238), and recovery codes."""

import base64
import unittest
from datetime import UTC, datetime
from urllib.parse import parse_qs, unquote, urlsplit

import pyotp

from project.lib import codes

# RFC 6238, appendix B: the secret of SHA-1, and the last six of the eight digits at each time.
SECRET = base64.b32encode(b"12345678901234567890").decode()
VECTORS = {
    59: "287082",
    1111111109: "081804",
    1111111111: "050471",
    1234567890: "005924",
    2000000000: "279037",
    20000000000: "353130",
}
STEP = 30  # seconds
RECOVERY_CODE = "ABCDEFGHIJKLMNOPQRST2347"


def at(seconds: float) -> datetime:
    """Return a time in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC)


class TestSteps(unittest.TestCase):
    """The time step of a code."""

    def test_vectors(self) -> None:
        """The codes of RFC 6238 belong to the steps of their times."""
        for seconds, code in VECTORS.items():
            with self.subTest(seconds):
                self.assertEqual(seconds // STEP, codes.step_of(code, SECRET, at(seconds)))
                self.assertEqual(seconds // STEP, codes.present_step(at(seconds)))

    def test_window(self) -> None:
        """A code is that of the present step or of the one before, and of no other."""
        step = 2000000000 // STEP
        start = step * STEP
        for seconds, expected in (
            (start - 1_000_000_000, None),
            (start - STEP, None),
            (start - 0.001, None),
            (start, step),
            (start + STEP - 0.001, step),
            (start + STEP, step),
            (start + 2 * STEP - 0.001, step),
            (start + 2 * STEP, None),
            (start + 1_000_000_000, None),
        ):
            with self.subTest(seconds - start):
                self.assertEqual(expected, codes.step_of(VECTORS[2000000000], SECRET, at(seconds)))

    def test_adjacent_steps(self) -> None:
        """In the same moment the codes of two steps belong to different steps."""
        now = at(1111111111)  # one second after a step has begun

        self.assertEqual(37037037, codes.step_of("050471", SECRET, now))
        self.assertEqual(37037036, codes.step_of("081804", SECRET, now))

    def test_no_code(self) -> None:
        """Other digits, and a recovery code, belong to no step."""
        for code in ("287083", "000000", RECOVERY_CODE, "94287082"):
            with self.subTest(code):
                self.assertIsNone(codes.step_of(code, SECRET, at(59)))

    def test_other_secret(self) -> None:
        """A code of one secret is none of another."""
        self.assertIsNone(codes.step_of("287082", "A" * 32, at(59)))


class TestParse(unittest.TestCase):
    """The texts that are codes."""

    def test_codes(self) -> None:
        """Blanks, hyphens and case are ignored."""
        for text, code in (
            ("287082", "287082"),
            ("005924", "005924"),
            ("287 082", "287082"),
            (" 2-8-7 0 8 2 ", "287082"),
            (RECOVERY_CODE, RECOVERY_CODE),
            (RECOVERY_CODE.lower(), RECOVERY_CODE),
            ("abcd-EFGH-ijkl-MNOP-qrst-2347", RECOVERY_CODE),
            (" ABCD EFGH IJKL MNOP QRST 2347 ", RECOVERY_CODE),
            ("2" * 24, "2" * 24),
        ):
            with self.subTest(text):
                self.assertEqual(code, codes.parse(text))

    def test_kinds(self) -> None:
        """Six digits are a code of an authenticator, and the other form a recovery code."""
        self.assertTrue(codes.is_totp(codes.parse("287 082")))
        self.assertFalse(codes.is_totp(codes.parse(RECOVERY_CODE.lower())))
        self.assertFalse(codes.is_totp(codes.parse("2" * 24)))

    def test_other_texts(self) -> None:
        """Every other text is refused."""
        lengths = ["2" * length for length in (0, 1, 5, 7, 8, 23, 25, 32, 60_000)]
        characters = [f"{RECOVERY_CODE[:-1]}{other}" for other in "0189=_+/.é"]
        separators = [f"287{other}082" for other in "\t\n\r\x0b\0\xa0\u2003\u2010\u2013_.,"]
        for text in (
            *lengths,
            *characters,
            *separators,
            "-" * 24,
            "28708A",
            "+28708",
            "2870.2",
            "0x1234",
            "1e1000",
            "287082\n",
            "287082287082",
        ):
            with self.subTest(text[:40]), self.assertRaises(ValueError):
                codes.parse(text)

    def test_unicode(self) -> None:
        """Digits and letters of other scripts and forms are refused."""
        for name, text in {
            "fullwidth digits": "\uff12\uff18\uff17\uff10\uff18\uff12",
            "Arabic digits": "\u0662\u0668\u0667\u0660\u0668\u0662",
            "Devanagari digits": "\u0968\u096e\u096d\u0966\u096e\u0968",
            "superscript digits": "\xb2\xb2\xb2\xb2\xb2\xb2",
            "mathematical digits": "\U0001d7ee" * 6,
            "fullwidth letters": "\uff21" * 24,
            "Cyrillic letters": "\u0410" * 24,
            "one fullwidth digit": "28708\uff12",
            # Their upper case is ASCII: I, S, SS and ST.
            "dotless i": f"{RECOVERY_CODE[:-1]}\u0131",
            "long s": f"{RECOVERY_CODE[:-1]}\u017f",
            "sharp s": f"{RECOVERY_CODE[:-2]}\xdf",
            "ligature": f"{RECOVERY_CODE[:-2]}\ufb06",
        }.items():
            with self.subTest(name), self.assertRaises(ValueError):
                codes.parse(text)


class TestSecrets(unittest.TestCase):
    """What is made at random."""

    def test_secrets(self) -> None:
        """A secret has 160 bits in base32 without padding, and no two are the same."""
        made = {codes.new_secret() for _ in range(100)}

        self.assertEqual(100, len(made))
        self.assertEqual({20}, {len(base64.b32decode(secret)) for secret in made})
        self.assertEqual({32}, set(map(len, made)))

    def test_recovery_codes(self) -> None:
        """A recovery code has 120 bits in 24 characters of base32, and no two are the same."""
        made = {codes.new_recovery_code() for _ in range(100)}

        self.assertEqual(100, len(made))
        self.assertEqual({24}, set(map(len, made)))
        self.assertEqual({15}, {len(base64.b32decode(code)) for code in made})
        # 2,400 characters: the chance that one of 32 does not occur is below 10 ** -30.
        self.assertEqual(set("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"), set("".join(made)))

    def test_grouped(self) -> None:
        """A recovery code is shown in groups of four, which are parsed to the same code."""
        self.assertEqual("ABCD-EFGH-IJKL-MNOP-QRST-2347", codes.grouped(RECOVERY_CODE))
        self.assertEqual(RECOVERY_CODE, codes.parse(codes.grouped(RECOVERY_CODE)))

    def test_hash(self) -> None:
        """The hash of a recovery code is SHA-256 (FIPS 180-4, example "abc")."""
        expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

        self.assertEqual(expected, codes.hash_of("abc"))


class TestUri(unittest.TestCase):
    """The URI for a QR code."""

    def test_parse(self) -> None:
        """An authenticator that reads the URI has the same secret, and shows the same codes."""
        parsed = pyotp.parse_uri(codes.uri(SECRET, "ada@test.com", "Example"))

        assert isinstance(parsed, pyotp.TOTP)  # noqa: S101  # for mypy
        self.assertEqual(
            (SECRET, "ada@test.com", "Example"), (parsed.secret, parsed.name, parsed.issuer)
        )
        for seconds, code in VECTORS.items():
            self.assertEqual(code, parsed.at(seconds))

    def test_parameters(self) -> None:
        """The URI has the secret and the service; the rest is what authenticators assume."""
        uri = urlsplit(codes.uri(SECRET, "ada@test.com", "Example"))

        self.assertEqual(("otpauth", "totp"), (uri.scheme, uri.netloc))
        self.assertEqual({"secret": [SECRET], "issuer": ["Example"]}, parse_qs(uri.query))

    def test_special_characters(self) -> None:
        """Names may have any character that an email or a display name can have."""
        for account, service in (
            ("a+b&c=d#e?f/g%41@test.com", "Ada & Söhne / 100%41 #1?"),
            ("o'neil!$*-^_`{|}~@test.com", "日本語 サービス"),
            ("ada@test.com", 'The "users" service = <best>; +1'),
        ):
            with self.subTest(account):
                text = codes.uri(SECRET, account, service)
                uri = urlsplit(text)

                self.assertTrue(text.isascii())
                self.assertNotRegex(text, r"[\s\"<>]")
                self.assertEqual("", uri.fragment)
                self.assertEqual(f"/{service}:{account}", unquote(uri.path))
                parameters = {"secret": [SECRET], "issuer": [service]}
                self.assertEqual(parameters, parse_qs(uri.query, strict_parsing=True))
                self.assertNotIn("+", uri.query)  # some authenticators show it as it is
                parsed = pyotp.parse_uri(text)
                self.assertEqual(
                    (SECRET, account, service), (parsed.secret, parsed.name, parsed.issuer)
                )
