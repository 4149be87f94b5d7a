"""Tokens over HTTP: what is in one, how long it lives, and every forgery that is refused."""

import base64
import hashlib
import hmac
import json
import secrets
import socket
from typing import Any, ClassVar

import jwt
from werkzeug.test import TestResponse

from project import clock, db, errors
from project.accounts import clients, invitations, links, second_factor
from project.config import ProductionConfig
from project.mail import outbox
from project.tests.accounts.mail_case import MAIL_SETTINGS
from project.tests.api.oauth_case import basic
from project.tests.base import BaseTestCase
from project.tests.rows import ORIGIN, add_user, start_session, stored_sessions
from project.tests.tokens.claims import claims_of, decode, encode
from project.tokens.links import Purpose

HEADER = {"alg": "HS256", "typ": "JWT"}
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
MISSING = object()  # a claim that is left out


class TestTokens(BaseTestCase):
    """Only tokens exactly as the service makes them are accepted."""

    def setUp(self) -> None:
        """Add a user, and stop the clock at a whole second."""
        super().setUp()
        self.user = add_user("test", "test@test.com", "test")
        self.move_clock(0)
        self.move_clock(-clock.utcnow().microsecond / 1_000_000)
        self.now = int(clock.utcnow().timestamp())
        self.key: str = self.app.config["SECRET_KEY"]
        self.session_id = decode(start_session(self.user).auth_token.split(".")[1])["sid"]

    def claims(self, **changes: object) -> dict[str, object]:
        """Return the claims of a genuine token with these changes."""
        times = {"iat": self.now, "exp": self.now + 3}
        claims = {"sub": str(self.user.id), "sid": self.session_id} | times | changes
        return {name: value for name, value in claims.items() if value is not MISSING}

    def forge(
        self,
        payload: object = None,
        *,
        header: object = HEADER,
        key: str | None = None,
        digest: str = "sha256",
    ) -> str:
        """Return a token made by hand, by default with the service's own key."""
        signed = f"{encode(header)}.{encode(self.claims() if payload is None else payload)}"
        secret = (self.key if key is None else key).encode()
        signature = hmac.new(secret, signed.encode(), getattr(hashlib, digest)).digest()
        return f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"

    def assert_accepted(self, token: str) -> None:
        """Check that the token is accepted and names the user."""
        response = self.get("/auth/status", token)

        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        self.assertEqual(self.user.id, response.get_json()["data"]["id"])

    def assert_refused(
        self, token: str, refusal: type[errors.ServiceError] = errors.TokenInvalid
    ) -> None:
        """Check that every route that requires a token refuses it."""
        for path in ("/auth/status", "/auth/logout"):
            self.assert_error(self.get(path, token), refusal)

    def assert_all_refused(self, **tokens: str) -> None:
        """Check that each of the named tokens is refused as invalid."""
        for name, token in tokens.items():
            with self.subTest(name):
                self.assert_refused(token)

    def test_genuine(self) -> None:
        """A token made by hand like a genuine one is accepted: forgeries differ in one thing."""
        self.assert_accepted(self.forge())

    def test_form(self) -> None:
        """A token is signed with HS256 and has sub, sid, amr, iat and exp only."""
        token = self.login().get_json()["auth_token"]
        header, payload, _ = token.split(".")
        mine = {session["id"] for session in stored_sessions()} - {self.session_id}

        self.assertEqual("HS256", decode(header)["alg"])
        self.assertEqual(self.claims(sid=mine.pop(), amr=["pwd"]), decode(payload))
        self.assertEqual(token, self.forge(decode(payload), header=decode(header)))

    def test_lifetime(self) -> None:
        """A token lives TOKEN_EXPIRATION_DAYS and TOKEN_EXPIRATION_SECONDS together."""
        self.app.config["TOKEN_EXPIRATION_DAYS"] = 2
        self.app.config["TOKEN_EXPIRATION_SECONDS"] = 7
        for name, token in {
            "login": self.login().get_json()["auth_token"],
            "registration": self.register("another", "another@test.com"),
            "model": self.user.encode_auth_token(self.user.id),
        }.items():
            with self.subTest(name):
                claims = decode(token.split(".")[1])

                self.assertEqual(self.now, claims["iat"])
                self.assertEqual(self.now + 2 * 86_400 + 7, claims["exp"])

    def test_default_lifetime(self) -> None:
        """Outside of tests a token lives 30 days by default."""
        config = ProductionConfig.from_environment(
            {
                "SECRET_KEY": "f81d4fae7dec11d0a76500a0c91e6bf6",
                "DATABASE_URL": "postgresql://localhost/users",
            }
        )

        self.assertEqual((30, 0), (config.TOKEN_EXPIRATION_DAYS, config.TOKEN_EXPIRATION_SECONDS))

    def test_expiry(self) -> None:
        """A token is valid until its exp, and expired at it."""
        token = self.login().get_json()["auth_token"]

        self.move_clock(2.999999)
        self.assert_accepted(token)

        self.move_clock(0.000001)
        self.assert_refused(token, errors.TokenExpired)

        self.move_clock(86_400)
        self.assert_refused(token, errors.TokenExpired)

    def test_expired_forgery(self) -> None:
        """An expired forgery is refused as invalid, not as expired."""
        self.move_clock(4)

        self.assert_refused(self.forge(), errors.TokenExpired)
        self.assert_refused(self.forge(key="0" * 32))

    def test_other_key(self) -> None:
        """A token signed with another key is refused, even with an empty or well-known key."""
        for key in ("", "my_precious", "0" * 64, self.key[::-1], self.key.upper()):
            with self.subTest(key):
                self.assert_refused(self.forge(key=key))

    def test_alg_none(self) -> None:
        """No spelling of "none" makes a signature unnecessary."""
        for alg in ("none", "None", "NONE", "nOnE", "NoNe", "none ", "", None, [], ["none"]):
            signed = self.forge(header=HEADER | {"alg": alg})
            bare, _, signature = signed.rpartition(".")
            for name, token in {
                "signed": signed,
                "bare": bare,
                "empty": f"{bare}.",
                "genuine": f"{bare}.{self.forge().rpartition('.')[2]}",
                "one": f"{bare}.{signature[0]}",
            }.items():
                with self.subTest(alg=alg, signature=name):
                    self.assert_refused(token)

    def test_other_algorithms(self) -> None:
        """Any algorithm but HS256 is refused, even one that the key would fit."""
        names = ["RS256", "ES256", "PS256", "EdDSA", "hs256", "HS256 ", "HS256\0", "dir"]
        digests = {"HS384": "sha384", "HS512": "sha512", "HS1": "sha1"}
        for alg, digest in (dict.fromkeys(names, "sha256") | digests).items():
            with self.subTest(alg):
                self.assert_refused(self.forge(header=HEADER | {"alg": alg}, digest=digest))
        self.assert_all_refused(
            missing=self.forge(header={"typ": "JWT"}),
            sha384=self.forge(digest="sha384"),
            sha512=self.forge(digest="sha512"),
        )

    def test_zeros(self) -> None:
        """A signature of zeros is refused (CVE-2022-21449)."""
        for alg, length in {
            "ES256": 64,
            "ES384": 96,
            "ES512": 132,
            "EdDSA": 64,
            "HS256": 32,
        }.items():
            bare = f"{encode(HEADER | {'alg': alg})}.{encode(self.claims())}"
            for zeros in (bytes(length), b"\x30\x06\x02\x01\x00\x02\x01\x00"):
                with self.subTest(alg, zeros=zeros):
                    self.assert_refused(
                        f"{bare}.{base64.urlsafe_b64encode(zeros).decode().rstrip('=')}"
                    )

    def test_other_headers(self) -> None:
        """A header has alg and typ once each and nothing else, even in a signed token."""
        types: list[object] = ["jwt", "at+jwt", "refresh+jwt", "JWE", "", None, 1, ["JWT"]]
        others: list[dict[str, Any]] = [{"typ": type_} for type_ in types]
        others += [{"cty": "JWT"}, {"zip": "DEF"}, {"enc": "A128GCM"}, {"p2c": 10**9}, {"": ""}]
        for other in [*others, {"b64": False}, {"epk": {}}, {"url": "https://a"}, {"ALG": "none"}]:
            with self.subTest(header=other):
                self.assert_refused(self.forge(header=HEADER | other))
        self.assert_all_refused(
            untyped=self.forge(header={"alg": "HS256"}),
            twice=self.forge(header='{"alg":"HS256","typ":"JWT","alg":"none"}'),
            typed_twice=self.forge(header='{"alg":"HS256","typ":"JWT","typ":"JWE"}'),
        )

    def test_other_serializations(self) -> None:
        """A token is a JWS in compact form: no JSON, no JWE and no nested token."""
        token = self.forge()
        header, payload, signature = token.split(".")
        flat = {"protected": header, "payload": payload, "signature": signature}
        self.assert_all_refused(
            flat=json.dumps(flat, separators=(",", ":")),
            general=json.dumps({"payload": payload, "signatures": [flat]}, separators=(",", ":")),
            jwe=f"{header}..{payload}..{signature}",
            nested=self.forge(token),
            detached=f"{header}..{signature}",
        )

    def test_critical_headers(self) -> None:
        """A token with a crit header is refused."""
        names: list[object] = [["unknown"], ["exp"], ["alg"], ["b64"], ["kid"], ["unknown", "exp"]]
        for crit in [*names, [], "exp", None, [1], {}]:
            with self.subTest(crit=crit):
                header = HEADER | {"crit": crit, "unknown": True, "exp": self.now, "b64": True}
                self.assert_refused(self.forge(header=header))
                self.assert_refused(self.forge(header=HEADER | {"crit": crit}))

    def test_keys_in_the_header(self) -> None:
        """A key or URL in the header is never used, even in a signed token."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setblocking(False)
            url = f"http://127.0.0.1:{server.getsockname()[1]}/keys.json"
            own = {"kty": "oct", "alg": "HS256", "k": encode("attacker")}
            for extra in (
                {"jku": url},
                {"x5u": url},
                {"jku": url, "kid": "1"},
                {"jwk": own},
                {"jwk": own, "kid": "1"},
                {"x5c": [base64.b64encode(b"certificate").decode()]},
                {"x5t": encode("thumbprint")},
            ):
                with self.subTest(extra=extra):
                    self.assert_refused(self.forge(header=HEADER | extra))
                    self.assert_refused(self.forge(header=HEADER | extra, key="attacker"))
            with self.assertRaises(BlockingIOError):
                server.accept()

    def test_kid_paths(self) -> None:
        """A kid opens no file and reaches no database."""
        paths = ["/dev/null", "../../../../../../dev/null", "file:///dev/null", "\0", ""]
        for kid in [*paths, "' UNION SELECT '' --", "|id", 1, ["/dev/null"]]:
            with self.subTest(kid=kid):
                self.assert_refused(self.forge(header=HEADER | {"kid": kid}))
                self.assert_refused(self.forge(header=HEADER | {"kid": kid}, key=""))

    def test_exp(self) -> None:
        """The exp claim is required, and is an integer."""
        soon = self.now + 3
        numbers = [str(soon), float(soon), soon - 0.5, float("inf"), float("nan"), True]
        for exp in [MISSING, None, *numbers, [soon], {"exp": soon}, "", "never"]:
            with self.subTest(exp=exp):
                self.assert_refused(self.forge(self.claims(exp=exp)))

    def test_past_exp(self) -> None:
        """Any exp in the past is expired, however long ago."""
        for exp in (self.now, self.now - 1, 1, 0, -1, -(2**63) - 1, -(10**400)):
            with self.subTest(exp=exp):
                self.assert_refused(self.forge(self.claims(exp=exp)), errors.TokenExpired)

    def test_huge_exp(self) -> None:
        """An exp beyond any date is accepted as an integer, and raises no error."""
        for exp in (2**31, 2**63, 10**20, 10**400):
            with self.subTest(exp=exp):
                self.assert_accepted(self.forge(self.claims(exp=exp)))
        for text in ("1e400", "1e20", "9" * 2_000 + ".0"):
            payload = json.dumps(self.claims(exp=0)).replace('"exp": 0', f'"exp": {text}')
            with self.subTest(exp=text[:20]):
                self.assert_refused(self.forge(payload))

    def test_iat(self) -> None:
        """The iat claim is required, and is an integer."""
        for iat in (MISSING, None, str(self.now), "", True, [self.now], float("inf"), 10**400):
            with self.subTest(iat=iat):
                self.assert_refused(self.forge(self.claims(iat=iat)))

    def test_iat_leeway(self) -> None:
        """The clock of the signing host may be up to five seconds ahead."""
        for ahead in (0, 1, 5):
            with self.subTest(ahead=ahead):
                self.assert_accepted(self.forge(self.claims(iat=self.now + ahead)))
        for ahead in (6, 60, 86_400 * 365):
            with self.subTest(ahead=ahead):
                token = self.forge(self.claims(iat=self.now + ahead, exp=self.now + ahead + 3))
                self.assert_refused(token)

    def test_sub(self) -> None:
        """The sub claim is required, and is the canonical decimal of an id."""
        number = str(self.user.id)
        arabic = number.translate({48 + digit: 0x660 + digit for digit in range(10)})
        fullwidth = number.translate({48 + digit: 0xFF10 + digit for digit in range(10)})
        types = [None, self.user.id, float(self.user.id), True, [number], {"id": number}]
        around = [f"0{number}", f"+{number}", f"-{number}", f" {number}", f"{number} "]
        behind = [number + end for end in ("\n", "\0", ".0", "e0", "_0", "L")]
        others = [arabic, fullwidth, hex(self.user.id), "test@test.com", "", "0", "-1"]
        large = [str(2**31), str(2**32 + self.user.id), str(2**63), "9" * 1_000]
        for sub in [MISSING, *types, *around, *behind, *others, *large]:
            with self.subTest(sub=sub):
                self.assert_refused(self.forge(self.claims(sub=sub)))

    def test_other_claims(self) -> None:
        """A token with another aud or a later nbf is refused."""
        self.assert_all_refused(
            aud=self.forge(self.claims(aud="another-service")),
            auds=self.forge(self.claims(aud=["another-service", "one-more"])),
            odd_aud=self.forge(self.claims(aud=1)),
            nbf=self.forge(self.claims(nbf=self.now + 60)),
            odd_nbf=self.forge(self.claims(nbf="later")),
        )

    def test_payloads(self) -> None:
        """A payload is a JSON object."""
        claims = json.dumps(self.claims())
        for payload in (
            [],
            [self.claims()],
            "text",
            "1",
            "null",
            "",
            "{",
            f"{claims}x",
            f"[{claims}]",
        ):
            with self.subTest(payload=payload):
                self.assert_refused(self.forge(payload))
        self.assert_all_refused(
            string=self.forge(json.dumps(claims)),
            deep=self.forge("[" * 1_400 + "]" * 1_400),
            digits=self.forge(claims.replace(f'"{self.user.id}"', "9" * 2_500)),
        )

    def test_headers(self) -> None:
        """A header is a JSON object of limited size."""
        nested = json.dumps(HEADER)[:-1] + ', "x": ' + "[" * 3_000 + "]" * 3_000 + "}"
        self.assert_all_refused(
            nested=self.forge(header=nested),
            open=self.forge(header="[" * 3_000),
            fitting=self.forge(header=json.dumps(HEADER)[:-1] + ', "x": ' + "[" * 2_600),
            list=self.forge(header=[HEADER]),
            string=self.forge(header='"HS256"'),
            null=self.forge(header="null"),
            empty=self.forge(header=""),
        )

    def test_sizes(self) -> None:
        """An empty or far too large token is refused, even a signed one."""
        for path in ("/auth/status", "/auth/logout"):
            with self.subTest(path):
                for header in ("Bearer ", "Bearer"):
                    response = self.client.get(path, headers={"Authorization": header})
                    self.assert_error(response, errors.TokenInvalid)
        self.assert_all_refused(
            signed=self.forge(self.claims(padding="x" * 60_000)),
            text="x" * 100_000,
            dots="." * 10_000,
            parts=".".join(["e30"] * 1_000),
        )

    def test_base64(self) -> None:
        """A token has exactly one spelling."""
        token = self.forge()
        header, payload, signature = token.split(".")
        last = ALPHABET.index(signature[-1])
        # The last character of a signature has two unused bits.
        for other in range(last - last % 4, last - last % 4 + 4):
            if other != last:
                with self.subTest(last=ALPHABET[other]):
                    self.assert_refused(token[:-1] + ALPHABET[other])
        for appended in ("=", "==", "A", "AA", "AAAA", ".", "/", "+", "~", "-", "_", ".e30"):
            with self.subTest(appended=appended):
                self.assert_refused(token + appended)
        self.assert_all_refused(
            short=token[:-1],
            standard=token.replace("-", "+").replace("_", "/") + "=",
            padded_header=f"{header}==.{payload}.{signature}",
            padded_payload=f"{header}.{payload}==.{signature}",
            swapped=f"{payload}.{header}.{signature}",
            two_parts=f"{header}.{payload}",
            leading_dot=f".{token}",
            no_header=f".{payload}.{signature}",
            no_payload=f"{header}..{signature}",
        )

    def test_changed_payload(self) -> None:
        """A token whose claims were changed after signing is refused."""
        other = add_user("other", "other@test.com", "test")
        header, _, signature = self.forge().split(".")

        self.assert_refused(f"{header}.{encode(self.claims(sub=str(other.id)))}.{signature}")
        self.assert_refused(f"{header}.{encode(self.claims(exp=self.now + 60))}.{signature}")

    def test_deleted_user(self) -> None:
        """A token of a deleted user is refused as inactive."""
        db.session.delete(self.user)
        db.session.commit()

        self.assert_refused(self.forge(), errors.AccountInactive)


class TestKinds(BaseTestCase):
    """Each kind of token is accepted in its own place, and in no other."""

    settings: ClassVar[dict[str, Any]] = MAIL_SETTINGS

    def setUp(self) -> None:
        """Add a user with a second factor, and recovery codes as their codes; stop the clock."""
        super().setUp()
        self.move_clock(0)
        self.user = add_user("test", "test@test.com", "test", mfa_enabled=True)
        self.codes = second_factor.new_recovery_codes(self.user.id)
        db.session.commit()

    def make(self) -> dict[str, str]:
        """Return a new token of each kind of the user, and of an invitation, by its place."""
        db.session.refresh(self.user)
        pair = start_session(self.user, second_factor.Method.RECOVERY_CODE)
        user: Any = links.user_by_id(self.user.id)
        invitations.invite(f"{secrets.token_hex(8)}@test.com", None, ORIGIN)
        db.session.commit()
        invitation: Any = links.invitation(int(outbox.newest(1)[0].parameters["invitation"]))
        made = {
            Purpose.VERIFY: links.for_user(Purpose.VERIFY, user, 60),
            Purpose.RESET: links.for_user(Purpose.RESET, user, 60),
            Purpose.EMAIL: links.for_user(Purpose.EMAIL, user, 60, "changed@test.com"),
            Purpose.INVITATION: links.for_invitation(invitation),
        }
        tokens = {purpose.value: link.url.partition("?token=")[2] for purpose, link in made.items()}
        return tokens | {
            "auth": pair.auth_token,
            "refresh": pair.refresh_token,
            "mfa": str(self.login(user.email).get_json()["mfa_token"]),
        }

    def present(self, place: str, token: str) -> TestResponse:
        """Return the response to a token where this kind belongs."""
        if place == "auth":
            return self.get("/auth/status", token)
        new_user = {"username": "new", "password": "test"}
        path, body = {
            "refresh": ("/auth/refresh", {"refresh_token": token}),
            "mfa": ("/auth/login/mfa", {"mfa_token": token, "code": self.codes[0]}),
            "verify": ("/auth/verify", {"token": token}),
            "reset": ("/auth/password/reset", {"token": token, "new_password": "test"}),
            "email": ("/auth/email/confirm", {"token": token}),
            "invitation": ("/auth/invitation", {"token": token} | new_user),
        }[place]
        return self.client.post(path, json=body)

    def assert_refused_at(self, place: str, token: str) -> None:
        """Check that a token is refused there as invalid, and changes nothing."""
        refusal = errors.LinkInvalid if place in set(Purpose) - {"mfa"} else errors.TokenInvalid
        with self.assert_nothing_changes():
            self.assert_error(self.present(place, token), refusal)

    def others(self) -> dict[str, str]:
        """Return tokens that belong to no place here."""
        return {}

    def test_places(self) -> None:
        """Each kind is refused in the place of each other, and accepted in its own."""
        tokens = self.make() | self.others()
        places = set(self.make())
        for kind, token in tokens.items():
            for place in sorted(places - {kind}):
                with self.subTest(kind, place=place):
                    self.assert_refused_at(place, token)
        for place in sorted(places):
            with self.subTest(place):
                response = self.present(place, self.make()[place])
                shown = response.get_data(as_text=True)
                self.assertEqual(201 if place == "invitation" else 200, response.status_code, shown)

    def test_second_step(self) -> None:
        """The token for the second step has a typ and an aud of its own, and needs both."""
        token = self.make()["mfa"]
        claims, key = claims_of(token), self.app.config["SECRET_KEY"]
        now = int(clock.utcnow().timestamp())
        times = {"iat": now, "exp": now + 300}
        expected = {"sub": str(self.user.id), "state": claims["state"], "aud": "mfa"} | times
        self.assertEqual({"alg": "HS256", "typ": "mfa+jwt"}, decode(token.split(".")[0]))
        self.assertEqual(expected, claims)
        self.assertEqual(token, jwt.encode(claims, key, headers={"typ": "mfa+jwt"}))
        for type_, audience in (
            ("mfa+jwt", "reset"),
            ("mfa+jwt", ["mfa"]),
            ("mfa+jwt", None),
            ("reset+jwt", "mfa"),
            ("reset+jwt", "reset"),
            ("MFA+jwt", "mfa"),
            ("JWT", "mfa"),
        ):
            with self.subTest(type=type_, audience=audience):
                changed = {name: value for name, value in claims.items() if name != "aud"}
                changed |= {"aud": audience} if audience else {}
                self.assert_refused_at("mfa", jwt.encode(changed, key, headers={"typ": type_}))
        self.assertEqual(200, self.present("mfa", token).status_code)


class TestKindsWithIssuer(TestKinds):
    """The same with auth tokens for other services, and a token of another service."""

    environment: ClassVar[dict[str, str]] = {"ISSUER": "https://users.example"}

    def others(self) -> dict[str, str]:
        """Return a client's own token."""
        credentials = basic("orders", clients.create("orders", "https://api.example", [], ORIGIN))
        db.session.commit()
        form = {"grant_type": "client_credentials"}
        response = self.client.post("/oauth/token", data=form, headers=credentials)
        return {"client": response.get_json()["access_token"]}
