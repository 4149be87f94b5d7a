"""Auth tokens for other services, over HTTP: what is in one, and every forgery that is refused."""

import json
import unittest
from typing import Any
from unittest import mock

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    encode_dss_signature,
)
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flask.testing import FlaskClient
from sqlalchemy import update

from project import clock, db, errors
from project.models import User
from project.tests.api.oauth_case import ISSUER
from project.tests.rows import start_session, stored_sessions
from project.tests.tokens.at_jwt_case import (
    MISSING,
    ORDER,
    AtJwtTestCase,
    from_base64,
    respelled,
    to_base64,
)
from project.tests.tokens.cases import LIFETIME, stored_ended, stored_keys
from project.tests.tokens.claims import claims_of, decode, encode
from project.tokens import at_jwt, jwk

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


class TestContent(AtJwtTestCase):
    """What a token says."""

    def test_claims(self) -> None:
        """A token has the claims of RFC 9068, and names its session, generation and `amr`."""
        self.move_clock(60)
        following = self.accepted(self.refresh(self.pair))["auth_token"]
        (session,) = stored_sessions()

        for generation, token in enumerate((self.token, following)):
            issued_at = self.now + 60 * generation
            self.assertEqual(
                {
                    "iss": ISSUER,
                    "aud": ISSUER,
                    "sub": str(self.user.id),
                    "client_id": "first-party",
                    "iat": issued_at,
                    "exp": issued_at + LIFETIME,
                    "jti": f"{session['id']}.{generation}",
                    "sid": session["id"],
                    "auth_time": self.now,
                    "amr": ["pwd"],
                },
                claims_of(token),
            )

    def test_header(self) -> None:
        """The header has alg, typ and kid only."""
        self.assertEqual(
            {"alg": "ES256", "typ": "at+jwt", "kid": stored_keys()[0]["kid"]},
            decode(self.token.split(".")[0]),
        )

    def test_verified_by_others(self) -> None:
        """What is published suffices to verify a token with PyJWT."""
        keys = jwt.PyJWKSet.from_dict(self.client.get("/.well-known/jwks.json").get_json())

        with mock.patch("jwt.api_jwt.datetime") as moment:
            moment.now.return_value = clock.utcnow()
            claims = jwt.decode(
                self.token, keys[self.kid], algorithms=["ES256"], audience=ISSUER, issuer=ISSUER
            )

        self.assertEqual(claims_of(self.token), claims)

    def test_audience(self) -> None:
        """TOKEN_AUDIENCE is the aud of tokens; a token for another audience is refused."""
        server = self.server(TOKEN_AUDIENCE="https://api.example")
        token = self.log_in(server)["auth_token"]

        self.assertEqual("https://api.example", claims_of(token)["aud"])
        self.assertEqual(ISSUER, claims_of(token)["iss"])
        self.accepted(self.status(token, server))
        self.assert_invalid(token)
        self.assert_invalid(self.token, server)

    def test_scope(self) -> None:
        """The roles are the scope, admin first; a change reaches tokens at the next refresh."""
        for admin, roles, scope in (
            (False, ["editor"], "editor"),
            (True, ["editor", "auditor"], "admin editor auditor"),
            (True, [], "admin"),
            (False, [], None),
        ):
            this_user = User.id == self.user.id
            db.session.execute(update(User).where(this_user).values(admin=admin, roles=roles))
            db.session.commit()
            with self.subTest(scope=scope):
                self.pair = self.accepted(self.refresh(self.pair))
                self.assertEqual(scope, claims_of(self.pair["auth_token"]).get("scope"))

    def test_every_issue(self) -> None:
        """Registration and login return such tokens; refresh tokens remain HS256."""
        registered = self.client.post(
            "/auth/register", json={"username": "x", "email": "x@test.com", "password": "test"}
        ).get_json()
        for pair in (self.pair, registered, self.accepted(self.refresh(self.pair))):
            self.assertEqual("ES256", jwt.get_unverified_header(pair["auth_token"])["alg"])
            self.assertEqual("HS256", jwt.get_unverified_header(pair["refresh_token"])["alg"])
            self.accepted(self.status(pair["auth_token"]))

    def test_repeated_refresh(self) -> None:
        """A repeated refresh returns a token with the same claims, and other signature."""
        first = self.accepted(self.refresh(self.pair))["auth_token"]
        again = self.accepted(self.refresh(self.pair))["auth_token"]

        self.assertEqual(claims_of(first), claims_of(again))
        self.accepted(self.status(first))
        self.accepted(self.status(again))

    def test_expiry(self) -> None:
        """A token is valid until its exp, and expired at it; a forgery is invalid even then."""
        other = self.signed(None, ec.generate_private_key(ec.SECP256R1()))
        self.move_clock(LIFETIME - 0.000001)
        self.accepted(self.status(self.token))
        self.move_clock(0.000001)

        self.assert_error(self.status(self.token), errors.TokenExpired)
        self.assert_invalid(other)

    def test_iat_leeway(self) -> None:
        """The clock of the signing server may be up to five seconds ahead."""
        self.accepted(self.status(self.with_claims(iat=self.now + 5)))
        self.assert_invalid(self.with_claims(iat=self.now + 6))

    def test_ended_session(self) -> None:
        """A token of a session that ended is refused, though its signature has been cached."""
        self.accepted(self.status(self.token))
        self.client.get("/auth/logout", headers={"Authorization": f"Bearer {self.token}"})

        self.assert_error(self.status(self.token), errors.SessionEnded)


class TestSwitch(AtJwtTestCase):
    """Turning ISSUER on and off."""

    def setUp(self) -> None:
        """Start a server without ISSUER too."""
        super().setUp()
        self.plain = self.server(ISSUER="")

    def test_without_issuer(self) -> None:
        """Without ISSUER a token is HS256 with sub, sid, amr, iat and exp, and needs no table."""
        keys = stored_keys()
        token = self.log_in(self.plain)["auth_token"]
        session = next(row for row in stored_sessions() if row["id"] == claims_of(token)["sid"])

        expected = {
            "sub": str(self.user.id),
            "sid": session["id"],
            "amr": ["pwd"],
            "iat": self.now,
            "exp": self.now + LIFETIME,
        }
        self.assertEqual(expected, claims_of(token))
        self.assertEqual({"alg": "HS256", "typ": "JWT"}, decode(token.split(".")[0]))
        secret = self.plain.application.config["SECRET_KEY"]
        jwt.decode(token, secret, ["HS256"], options={"verify_iat": False, "verify_exp": False})
        self.assertEqual(keys, stored_keys())

    def test_unknown_paths(self) -> None:
        """Without ISSUER the routes for other services do not exist."""
        for method, path in (
            ("GET", "/.well-known/jwks.json"),
            ("GET", "/.well-known/oauth-authorization-server"),
            ("POST", "/oauth/introspect"),
            ("POST", "/oauth/revoke"),
            ("POST", "/oauth/token"),
            ("GET", "/oauth/revocations"),
        ):
            with self.subTest(path):
                response = FlaskClient(self.plain.application).open(path, method=method)
                self.assert_error(response, errors.NotFound)

    def test_on(self) -> None:
        """HS256 tokens from before the switch are accepted until they end; a refresh moves on."""
        pair = self.log_in(self.plain)

        self.accepted(self.status(pair["auth_token"]))
        self.move_clock(LIFETIME - 1)
        self.accepted(self.status(pair["auth_token"]))
        self.move_clock(1)
        self.assert_error(self.status(pair["auth_token"]), errors.TokenExpired)
        following = self.accepted(self.refresh(pair))["auth_token"]
        self.assertEqual("ES256", jwt.get_unverified_header(following)["alg"])
        self.accepted(self.status(following))

    def test_off(self) -> None:
        """After ISSUER is removed, its tokens are refused and refresh tokens work."""
        self.assert_invalid(self.token, self.plain)

        following = self.accepted(self.refresh(self.pair, self.plain))["auth_token"]
        self.assertEqual("HS256", jwt.get_unverified_header(following)["alg"])
        self.accepted(self.status(following, self.plain))

    def test_another_issuer(self) -> None:
        """A server with the same keys and another ISSUER refuses tokens, and refreshes them."""
        for name in ("https://users.example.org", "https://users.exampl", f"{ISSUER}/v2"):
            with self.subTest(name):
                server = self.server(ISSUER=name)
                self.assert_invalid(self.token, server)
                self.assert_invalid(self.log_in(server)["auth_token"])


class TestForgeries(AtJwtTestCase):
    """Forgeries, which differ from a genuine token in one thing."""

    def setUp(self) -> None:
        """Make the key of an attacker."""
        super().setUp()
        self.others = ec.generate_private_key(ec.SECP256R1())

    def test_genuine(self) -> None:
        """A token made by hand like a genuine one is accepted."""
        self.accepted(self.status(self.signed()))

    def test_alg_none(self) -> None:
        """No spelling of "none" makes a signature unnecessary."""
        signature = self.token.rpartition(".")[2]
        for alg in ("none", "None", "NONE", "nOnE", "", None, MISSING, [], ["ES256"], 256, {}):
            bare = self.signed(alg=alg).rpartition(".")[0]
            for end in ("", ".", f".{signature}", f".{signature[0]}"):
                with self.subTest(alg=alg, end=end[:3]):
                    self.assert_invalid(bare + end)

    def test_other_algorithms(self) -> None:
        """The header says ES256, even if the signature is that of ES256."""
        for alg in ("es256", "ES256 ", "ES256K", "ES384", "ES512", "HS256", "RS256", "EdDSA"):
            with self.subTest(alg):
                self.assert_invalid(self.signed(alg=alg))

    def test_public_key_as_secret(self) -> None:
        """HS256 with anything public as the secret is refused (RFC 8725, 2.1)."""
        public = self.key.public_key()
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        stored = stored_keys()[0]["public"]
        published = self.client.get("/.well-known/jwks.json")
        secrets = {
            "PEM": pem,
            "PEM without newline": pem.strip(),
            "DER": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            "point": public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
            "JWK": json.dumps(stored).encode(),
            "short JWK": json.dumps(stored, separators=(",", ":")).encode(),
            "key set": published.get_data(),
            "x": from_base64(stored["x"]),
            "kid": self.kid.encode(),
            "issuer": ISSUER.encode(),
            "empty": b"",
        }
        before = {name: claims_of(self.token)[name] for name in ("sub", "sid", "iat", "exp")}
        for name, secret in secrets.items():
            for claims in (claims_of(self.token), before):
                for headers in ({"typ": "JWT"}, {"typ": "at+jwt", "kid": self.kid}, {"kid": None}):
                    parts = {"alg": "HS256", "typ": "JWT"} | headers
                    signed = f"{encode(parts)}.{encode(claims)}"
                    digest = jwt.algorithms.HMACAlgorithm.SHA256
                    mac = jwt.algorithms.HMACAlgorithm(digest).sign(signed.encode(), secret)
                    with self.subTest(name, headers=headers):
                        self.assert_invalid(f"{signed}.{to_base64(mac)}")

    def test_other_key(self) -> None:
        """A token signed with another key is refused, whatever its header says of the key."""
        own = {
            "kty": "EC",
            "crv": "P-256",
            **jwt.algorithms.ECAlgorithm.to_jwk(self.others.public_key(), as_dict=True),
        }
        others: list[dict[str, Any]] = [
            {},
            {"jwk": own},
            {"jwk": own | {"kid": self.kid}},
            {"kid": jwk.thumbprint({name: str(own[name]) for name in ("crv", "kty", "x", "y")})},
            {"jku": f"{ISSUER}/.well-known/jwks.json"},
            {"kid": MISSING, "jwk": own},
        ]
        for headers in others:
            with self.subTest(headers=headers):
                self.assert_invalid(self.signed(None, self.others, **headers))

    def test_other_headers(self) -> None:
        """A header has alg, typ and kid only, even in a token that the service signed."""
        url = "https://attacker.example/keys.json"
        others: list[dict[str, Any]] = [
            {"jku": url},
            {"jwk": {"kty": "oct", "k": "AAAA"}},
            {"jwk": stored_keys()[0]["public"]},
            {"x5c": ["MIIB"]},
            {"x5u": url},
            {"x5t": "AAAA"},
            {"crit": ["exp"], "exp": self.now},
            {"crit": []},
            {"crit": ["b64"], "b64": True},
            {"crit": ["kid"]},
            {"b64": False},
            {"b64": True},
            {"cty": "JWT"},
            {"zip": "DEF"},
            {"": ""},
        ]
        for headers in others:
            with self.subTest(headers=headers):
                self.assert_invalid(self.signed(**headers))

    def test_kid(self) -> None:
        """The kid is one of a key of the service, and a text."""
        kids: list[Any] = ["", "unknown", self.kid[:-1], self.kid.swapcase(), f"{self.kid} "]
        kids += [MISSING, None, 0, True, [self.kid], [], {"kid": self.kid}, {}, 1e400]
        kids += ["x" * 1_000, "x" * 100_000, "/dev/null", "' OR 1=1 --", "\0", "\ud800", "kid\n"]
        for kid in kids:
            with self.subTest(kid=str(kid)[:50].encode("unicode_escape")):
                self.assert_invalid(self.signed(kid=kid))
                self.assert_invalid(self.signed(None, self.others, kid=kid))

    def test_typ(self) -> None:
        """The typ is at+jwt exactly, so no other kind of token is taken for one."""
        types = ["JWT", "AT+JWT", "at+JWT", "application/at+jwt", "at+jwt ", "refresh+jwt", ""]
        for type_ in [*types, None, MISSING, ["at+jwt"], 1, "id+jwt", "logout+jwt"]:
            with self.subTest(typ=type_):
                self.assert_invalid(self.signed(typ=type_))

    def test_duplicate_headers(self) -> None:
        """A header that names a parameter twice gives no other meaning to a forged token."""
        header = f'{{"alg":"none","kid":"{self.kid}","typ":"at+jwt","alg":"ES256"}}'
        last = f'{{"alg":"ES256","kid":"{self.kid}","typ":"at+jwt","alg":"none"}}'

        self.assert_all_invalid(
            first=self.signed(None, self.others, header=header), last=self.signed(header=last)
        )

    def test_headers(self) -> None:
        """A header is a JSON object that is not nested too deeply."""
        nested = json.dumps({"alg": "ES256", "kid": self.kid, "typ": "at+jwt"})[:-1]
        for header in (
            "[" * 2_900,
            "[]",
            "null",
            '"ES256"',
            "1",
            "{",
            f'{nested}, "x": {"[" * 1_400}{"]" * 1_400}}}',
        ):
            with self.subTest(header[:50]):
                self.assert_invalid(self.signed({}, header=header))

    def test_iss(self) -> None:
        """A token of another issuer is refused, even if the key is the same."""
        names = ["https://attacker.example", f"{ISSUER}/", ISSUER.upper(), ISSUER[:-1], ""]
        for iss in [*names, None, MISSING, [ISSUER], {"iss": ISSUER}, 1]:
            with self.subTest(iss=iss):
                self.assert_invalid(self.with_claims(iss=iss))

    def test_aud(self) -> None:
        """A token for another audience is refused."""
        names = ["https://api.example", f"{ISSUER}/", "", "refresh", "reset"]
        for aud in [*names, None, MISSING, [ISSUER], [ISSUER, "x"], {ISSUER: 1}, 1]:
            with self.subTest(aud=aud):
                self.assert_invalid(self.with_claims(aud=aud))

    def test_missing_claims(self) -> None:
        """Each claim that RFC 9068 requires is required, and so is the session."""
        for name in ("iss", "aud", "sub", "client_id", "iat", "exp", "jti", "sid"):
            with self.subTest(name):
                self.assert_invalid(self.with_claims(**{name: MISSING}))

    def test_types_of_times(self) -> None:
        """The times are integers."""
        for value in (None, str(self.now), float(self.now), True, [self.now], 1e400):
            for name in ("iat", "exp"):
                with self.subTest(name, value=value):
                    self.assert_invalid(self.with_claims(**{name: value}))

    def test_past(self) -> None:
        """A token whose exp is past, however long, has expired."""
        for exp in (self.now, self.now - 1, 0, -1, -(10**400)):
            with self.subTest(exp=exp):
                self.assert_error(self.status(self.with_claims(exp=exp)), errors.TokenExpired)

    def test_future(self) -> None:
        """A token that is issued in the future is refused."""
        for ahead in (6, 60, 86_400, 10**30):
            with self.subTest(ahead=ahead):
                token = self.with_claims(iat=self.now + ahead, exp=self.now + ahead + 60)
                self.assert_invalid(token)

    def test_payloads(self) -> None:
        """A payload is a JSON object."""
        claims = json.dumps(claims_of(self.token))
        around = [f"[{claims}]", f"{claims}x", json.dumps(claims)]
        for payload in (" ", "{", "[]", "null", "1", *around):
            with self.subTest(payload[:10]):
                self.assert_invalid(self.signed(payload))
        self.assert_invalid(self.signed("[" * 1_400 + "]" * 1_400))

    def test_changed_payload(self) -> None:
        """A token whose claims were changed after signing is refused."""
        header, _, signature = self.token.split(".")
        for change in ({"sub": str(self.other.id)}, {"exp": self.now + 9_999}, {"scope": "admin"}):
            with self.subTest(change=change):
                payload = encode(claims_of(self.token) | change)
                self.assert_invalid(f"{header}.{payload}.{signature}")

    def test_session_of_another_user(self) -> None:
        """A token that names one user's session for another user is refused."""
        session = start_session(self.other)
        token = self.with_claims(sid=claims_of(session.auth_token)["sid"])

        self.assert_error(self.status(token), errors.SessionEnded)

    def test_zeros(self) -> None:
        """A signature of zeros, or of numbers out of range, is refused (CVE-2022-21449)."""
        bare = self.token.rpartition(".")[0]
        for r, s in ((0, 0), (0, 1), (1, 0), (ORDER, ORDER), (ORDER, 1), (2**256 - 1, 2**256 - 1)):
            with self.subTest(r=r, s=s):
                self.assert_invalid(f"{bare}.{to_base64(r.to_bytes(32) + s.to_bytes(32))}")

    def test_forms_of_a_signature(self) -> None:
        """A signature is 64 bytes: neither DER nor longer nor shorter."""
        bare, _, signature = self.token.rpartition(".")
        raw = from_base64(signature)
        r, s = int.from_bytes(raw[:32]), int.from_bytes(raw[32:])
        self.assert_all_invalid(
            der=f"{bare}.{to_base64(encode_dss_signature(r, s))}",
            longer=f"{bare}.{to_base64(raw + bytes(1))}",
            padded=f"{bare}.{to_base64(bytes(1) + raw[:32] + bytes(1) + raw[32:])}",
            shorter=f"{bare}.{to_base64(raw[:63])}",
            half=f"{bare}.{to_base64(raw[:32])}",
            swapped=f"{bare}.{to_base64(raw[32:] + raw[:32])}",
        )

    def test_both_spellings(self) -> None:
        """Both spellings of a signature are accepted and belong to one session."""
        other = respelled(self.token)
        self.assertNotEqual(self.token, other)
        tokens = self.token, other
        for token in tokens:
            self.accepted(self.status(token))

        self.accepted(self.client.get("/auth/logout", headers={"Authorization": f"Bearer {other}"}))

        for token in tokens:
            self.assert_error(self.status(token), errors.SessionEnded)
        (row,) = stored_ended()
        self.assertEqual(claims_of(self.token)["sid"], row["session_id"])

    def test_base64(self) -> None:
        """A part of a token has exactly one spelling in base64url."""
        header, payload, signature = self.token.split(".")
        last = ALPHABET.index(signature[-1])
        # The last character of a signature has four unused bits.
        for other in range(last - last % 16, last - last % 16 + 16):
            if other != last:
                with self.subTest(last=ALPHABET[other]):
                    self.assert_invalid(self.token[:-1] + ALPHABET[other])
        for appended in ("=", "==", "A", "AA", "AAAA", ".", "/", "+", "~", "-", "_", ".e30"):
            with self.subTest(appended=appended):
                self.assert_invalid(self.token + appended)
        self.assert_all_invalid(
            short=self.token[:-1],
            padded_header=f"{header}==.{payload}.{signature}",
            padded_payload=f"{header}.{payload}==.{signature}",
            standard=f"{self.token.replace('-', '+').replace('_', '/')}==",
            swapped=f"{payload}.{header}.{signature}",
            two_parts=f"{header}.{payload}",
            detached=f"{header}..{signature}",
            no_header=f".{payload}.{signature}",
            leading_dot=f".{self.token}",
            too_long=self.with_claims(padding="x" * 5_000),
        )


class TestOtherTokens(AtJwtTestCase):
    """Tokens of another kind, which the service itself has signed."""

    def test_refresh_token(self) -> None:
        """A refresh token is no auth token, and an auth token no refresh token."""
        self.assert_invalid(self.pair["refresh_token"])

        swapped = {"refresh_token": self.token}
        self.assert_error(self.refresh(swapped), errors.TokenInvalid)
        again = self.signed(claims_of(self.pair["refresh_token"]), typ="refresh+jwt")
        self.assert_error(self.refresh({"refresh_token": again}), errors.TokenInvalid)
        self.assert_invalid(again)
        self.accepted(self.refresh(self.pair))

    def test_token_of_a_client(self) -> None:
        """A client's own token is refused, even for this service's audience."""
        headers = self.add_client()
        answer = self.client.post(
            "/oauth/token", data={"grant_type": "client_credentials"}, headers=headers
        )
        token = self.accepted(answer)["access_token"]

        self.assert_refused(token, errors.TokenInvalid)
        self.assert_error(self.refresh({"refresh_token": token}), errors.TokenInvalid)

    def test_links(self) -> None:
        """The token of a link is no auth token, and an auth token opens no link."""
        for typ, aud in (("verify+jwt", "verify"), ("reset+jwt", "reset"), ("JWT", "reset")):
            secret = {"sub": str(self.user.id), "iat": self.now, "exp": self.now + 60}
            link = jwt.encode(
                secret | {"aud": aud}, self.app.config["SECRET_KEY"], headers={"typ": typ}
            )
            with self.subTest(typ, aud=aud):
                self.assert_invalid(link)
                for token in (self.token, self.signed(typ=typ), self.with_claims(aud=aud)):
                    body = {"token": token, "new_password": "another"}
                    refused = self.client.post("/auth/password/reset", json=body)
                    self.assert_error(refused, errors.LinkInvalid)

    def test_model(self) -> None:
        """The token of User.encode_auth_token belongs to no session and is refused."""
        self.assert_invalid(self.user.encode_auth_token(self.user.id))


class TestPure(unittest.TestCase):
    """The functions that encode and verify, without an application."""

    def test_cache(self) -> None:
        """A token that one issuer has verified is verified again for another one."""
        pair = jwk.make()
        key, public = jwk.parse_private(pair.private), jwk.parse_public(pair.public)
        claims: at_jwt.Claims = {
            "aud": "a",
            "sub": "1",
            "client_id": "c",
            "iat": 1,
            "exp": 2,
            "jti": "j",
        }
        token = at_jwt.encode(claims, issuer="https://a", kid=pair.kid, key=key)
        issuer = at_jwt.Issuer("https://a", {pair.kid: public})

        self.assertEqual((pair.kid, {"iss": "https://a", **claims}), at_jwt.verify(token, issuer))
        with self.assertRaises(at_jwt.UnknownKey):
            at_jwt.verify(token, at_jwt.Issuer("https://a", {}))
        with self.assertRaises(errors.TokenInvalid):
            at_jwt.verify(token, at_jwt.Issuer("https://b", {pair.kid: public}))

    def test_jwk(self) -> None:
        """The coordinates have 32 bytes, also if the first ones are zero; a kid is a thumbprint."""
        for _ in range(2_000):
            public = jwk.make().public
            self.assertEqual({43}, {len(public[name]) for name in ("x", "y", "kid")})
        self.assertEqual(
            {"kty", "crv", "x", "y", "kid", "alg", "use"}, public.keys(), "and nothing private"
        )

    def test_thumbprint(self) -> None:
        """The thumbprint is that of RFC 7638, whatever the order and the other members."""
        public = {  # of RFC 7515, A.3
            "use": "sig",
            "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
            "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
            "crv": "P-256",
            "kty": "EC",
        }
        self.assertEqual("oKIywvGUpTVTyxMQ3bwIIeQUudfr_CkLMjCE19ECD-U", jwk.thumbprint(public))
