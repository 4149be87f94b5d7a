"""Valid request bodies, ids and Authorization headers, up to the limit of each rule."""

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock
from urllib.parse import quote

from sqlalchemy import delete, update
from werkzeug.test import TestResponse

from project import db, errors
from project.lib.bulkhead import Bulkhead
from project.models import User
from project.tests.base import BaseTestCase
from project.tests.contract.cases import (
    BODIES,
    JSON,
    LOGIN,
    NEW_USER_ROUTES,
    PASSWORD,
    ROUTES,
    SECRET,
    USER,
    InputTestCase,
)
from project.tests.rows import add_user, stored_users

LIMIT = 64 * 1024
NOT_STRINGS: list[object] = [1, 0, 1.5, True, False, None, [], [SECRET], {}, {"text": SECRET}]


class TestBodies(InputTestCase):
    """A body is a JSON object sent as application/json, of at most 64 KiB."""

    def test_no_object(self) -> None:
        """A body that is no JSON object in UTF-8 is refused."""
        text = json.dumps(USER)
        depth = 30_000
        for name, body in {
            "empty": b"",
            "blank": b" \r\n",
            "broken": text[:-1].encode(),
            "brace": b"{",
            "trailing text": text.encode() + b"x",
            "two objects": 2 * text.encode(),
            "trailing comma": text[:-1].encode() + b",}",
            "comment": text.encode() + b"// comment",
            "single quotes": text.replace('"', "'").encode(),
            "form": b"username=justatest&email=test%40test.com&password=" + SECRET.encode(),
            "list": b"[]",
            "list of it": f"[{text}]".encode(),
            "string": b'"text"',
            "string of it": json.dumps(text).encode(),
            "string of string of it": json.dumps(json.dumps(text)).encode(),
            "number": b"1",
            "true": b"true",
            "null": b"null",
            "bare NaN": b"NaN",
            "NaN": json.dumps(USER | {"extra": float("nan")}).encode(),
            "Infinity": json.dumps(USER | {"extra": float("-inf")}).encode(),
            "huge number": text[:-1].encode() + b', "extra": 1e999}',
            "deep lists": b"[" * depth + b"]" * depth,
            "open lists": b"[" * LIMIT,
            "deep objects": b'{"a":' * 9_000 + b"1" + b"}" * 9_000,
            "deep in a key": text[:-1].encode() + b', "a": ' + b"[" * depth + b"]" * depth + b"}",
            "UTF-16": text.encode("utf-16"),
            "UTF-16, no mark": text.encode("utf-16-le"),
            "UTF-32": text.encode("utf-32"),
            "UTF-8 with a mark": text.encode("utf-8-sig"),
            "Latin-1": json.dumps(USER | {"username": "Zoë"}, ensure_ascii=False).encode("latin-1"),
            "lone surrogate": json.dumps(USER | {"username": "\ud800"}).encode(),
            "surrogate in bytes": text.replace("just", "\ud800").encode("utf-8", "surrogatepass"),
            "control character": text.replace("just", "\n").encode(),
            "overlong": text.encode().replace(b"just", b"\xc0\xaf"),
            "NUL at the end": text.encode() + b"\0",
        }.items():
            for path in ROUTES:
                with self.subTest(name, path=path):
                    self.assert_refused(path, {"body"}, data=body, content_type=JSON)

    def test_hundred_thousand_levels(self) -> None:
        """A body of 100,000 levels is refused by its size."""
        for path in ROUTES:
            with self.subTest(path):
                response = self.send_raw(path, b"[" * 100_000)

                self.assertEqual(413, response.status_code)

    def test_empty_object(self) -> None:
        """An empty object lacks every field."""
        for path, body in BODIES.items():
            self.assert_refused(path, set(body), json={})

    def test_media_types(self) -> None:
        """Any media type other than application/json is refused."""
        known = f"text/plain text/json application/xml {JSON}p application json".split()
        suffixed = ["application/vnd.api+json", "application/problem+json", "application/json-seq"]
        forms = ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
        mixed = ["application/json, text/plain", "text/plain; application/json"]
        for media_type in [None, "", *known, *suffixed, *forms, *mixed]:
            for path in ROUTES:
                with self.subTest(media_type, path=path):
                    body = json.dumps(USER).encode()
                    self.assert_refused(path, {"body"}, data=body, content_type=media_type)

    def test_media_type_spellings(self) -> None:
        """The media type is accepted in any case and with a charset."""
        self.register(**USER)
        for media_type in ("Application/JSON", f"{JSON}; charset=utf-8", f"{JSON};charset=UTF-8"):
            with self.subTest(media_type):
                response = self.send_raw("/auth/login", json.dumps(LOGIN).encode(), media_type)

                self.assertEqual(200, response.status_code)

    def padded(self, size: int) -> bytes:
        """Return a registration of `size` bytes."""
        text = json.dumps(USER | {"padding": ""})
        return text.replace('"padding": "', '"padding": "' + "x" * (size - len(text))).encode()

    def test_size(self) -> None:
        """64 KiB are accepted and one byte more is not, with or without a declared length."""
        chunked = {"CONTENT_LENGTH": "", "wsgi.input_terminated": True}
        for name, environ in {"declared": {}, "chunked": chunked}.items():
            for path in ROUTES:
                with self.subTest(name, path=path):
                    answers = [
                        self.send(
                            path,
                            input_stream=io.BytesIO(self.padded(size)),
                            content_type=JSON,
                            environ_overrides=environ,
                        )
                        for size in (LIMIT + 1, LIMIT)
                    ]

                    self.assert_error(answers[0], errors.PayloadTooLarge)
                    # The second body was read: the response is about its fields.
                    self.assertNotIn("body", answers[1].get_json().get("errors", {}))
                    self.assertNotEqual(413, answers[1].status_code)
        names = [user["username"] for user in stored_users()]
        self.assertEqual(["caller", "justatest"], names)

    def test_declared_too_large(self) -> None:
        """A body that is only declared too large is refused without reading it."""
        environ = {"CONTENT_LENGTH": str(10**12)}
        for path, body in BODIES.items():
            with self.subTest(path):
                response = self.send(path, json=body, environ_overrides=environ)

                self.assertEqual(413, response.status_code)
        self.assertEqual(["caller"], [user["username"] for user in stored_users()])

    def test_types(self) -> None:
        """A field is a string, and no other JSON type."""
        for path, body in BODIES.items():
            for field in body:
                for value in NOT_STRINGS:
                    with self.subTest(path, field=field, value=value):
                        self.assert_refused(path, {field}, json=body | {field: value})

    def test_every_field_is_named(self) -> None:
        """All invalid fields are named at once."""
        body = {"username": "", "email": "test", "password": 1}

        self.assert_refused("/auth/register", {"username", "email", "password"}, json=body)

    def test_unknown_keys(self) -> None:
        """An unknown key is ignored, even when it is the name of a column."""
        extra = {
            "id": 4_711,
            "admin": True,
            "active": False,
            "created_at": "2000-01-01T00:00:00Z",
            "username_key": "another",
            "role": "admin",
            "__class__": {"admin": True},
            "": None,
        }
        for path in NEW_USER_ROUTES:
            with self.subTest(path):
                body = USER | {"username": path, "email": f"test@{path[-5:]}.com"} | extra

                response = self.client.post(path, json=body)

                self.assertEqual(201, response.status_code)
                user = stored_users()[-1]
                self.assertNotEqual(4_711, user["id"])
                self.assertIs(False, user["admin"])
                self.assertIs(True, user["active"])
                self.assertEqual(path, user["username_key"])
                self.assertGreater(user["created_at"].year, 2_000)
                credentials = {"email": body["email"], "password": SECRET} | extra
                login = self.client.post("/auth/login", json=credentials)
                self.assertEqual(200, login.status_code)


class TestCodes(InputTestCase):
    """A code is six digits or a recovery code."""

    def routes(self) -> dict[str, dict[str, str]]:
        """Return the routes that take a code, and a body without it for each."""
        user = add_user("other", "other@test.com", SECRET)
        # An admin is asked for no code without an authenticator.
        caller = User.query.filter_by(username="caller").one()
        caller.admin = True
        db.session.commit()
        routes = {
            f"PATCH /users/{caller.id}": PASSWORD | {"username": "new"},
            f"DELETE /users/{user.id}": {},
            f"DELETE /users/{user.id}/totp": {},
            "/auth/email": PASSWORD | {"email": "new@test.com"},
        }
        for route, body in BODIES.items():
            if {"password", "current_password", "code"} & body.keys() and "username" not in body:
                routes[route] = {name: value for name, value in body.items() if name != "code"}
        del routes["/auth/totp"]  # a user who has no authenticator yet
        return routes

    def test_no_code(self) -> None:
        """Any other text is an invalid payload, and so is any other type."""
        texts = ["", " ", "-", "12345", "1234567", "12345a", "12345.", "12.456", "+12345", "0x1234"]
        blanks = ["12345\n", "123456\n", "\t123456", "123\u00a0456", "12345\0", "123456\0"]
        digits = ["\uff11\uff12\uff13\uff14\uff15\uff16", "١٢٣٤٥٦", "12345²"]
        recovery = ["A" * 23, "A" * 25, "A" * 23 + "1", "A" * 23 + "0", "A" * 23 + "=", "é" * 24]
        # In upper case, the first two are ASCII letters.
        others = ["ß" * 12, "\N{LATIN SMALL LETTER DOTLESS I}" * 24, "A" * 12 + ";" + "A" * 11]
        routes = self.routes()
        self.assertEqual(11, len(routes))
        for value in [*texts, *blanks, *digits, *recovery, *others, "A" * 32, *NOT_STRINGS]:
            for route, body in routes.items():
                with self.subTest(value, route=route):
                    self.assert_refused(route, {"code"}, json=body | {"code": value})

    def test_unneeded(self) -> None:
        """A code of a user without an authenticator is ignored, in any spelling."""
        self.register(**USER)
        for code in ("123456", " 123-456 ", "1 2 3 4 5 6", "a2b3" * 6, "A2B3-" * 5 + "A2B3"):
            with self.subTest(code):
                response = self.client.post("/auth/login", json=LOGIN | {"code": code})

                self.assertEqual(200, response.status_code)


class TestOptionalBodies(InputTestCase):
    """An admin's DELETE of a user, or of their authenticator, may have a body."""

    def setUp(self) -> None:
        """Make the caller an admin, and add a user with an authenticator."""
        super().setUp()
        db.session.execute(update(User).values(admin=True))
        db.session.commit()
        self.routes = self.add_other()

    def add_other(self) -> list[str]:
        """Add the user, again if they are there; return the routes."""
        db.session.execute(delete(User).where(User.username == "other"))
        user = add_user("other", "other@test.com", SECRET, mfa_enabled=True)
        return [f"DELETE /users/{user.id}", f"DELETE /users/{user.id}/totp"]

    def test_accepted(self) -> None:
        """No body, an empty one, and an object with any unknown members are accepted."""
        chunked = {"CONTENT_LENGTH": "", "wsgi.input_terminated": True}
        requests: dict[str, dict[str, Any]] = {
            "none": {},
            "empty": {"data": b"", "content_type": JSON},
            "empty text": {"data": b"", "content_type": "text/plain"},
            "empty, of no length": {"data": b"", "environ_overrides": chunked},
            "object": {"json": {}},
            "unknown member": {"json": {"email": 1, "current_password": None}},
            "code": {"json": {"code": "123456"}},
        }
        for name, request in requests.items():
            for number, message in enumerate(("User deleted.", "Authenticator turned off.")):
                with self.subTest(name, message=message):
                    response = self.send(self.add_other()[number], **request)

                    self.assertEqual(200, response.status_code, response.get_data(as_text=True))
                    self.assertEqual(message, response.get_json()["message"])

    def test_refused(self) -> None:
        """Any other body is refused, and nothing changes."""
        for name, body in {
            "blank": b" ",
            "broken": b"{",
            "list": b"[]",
            "list of it": b'[{"code": "123456"}]',
            "string": b'"123456"',
            "number": b"123456",
            "null": b"null",
            "UTF-16": "{}".encode("utf-16"),
        }.items():
            for route in self.routes:
                with self.subTest(name, route=route):
                    self.assert_refused(route, {"body"}, data=body, content_type=JSON)

    def test_media_types(self) -> None:
        """A body of another media type is refused, and nothing changes."""
        for media_type in (None, "", "text/plain", "application/x-www-form-urlencoded", f"{JSON}p"):
            for route in self.routes:
                with self.subTest(media_type, route=route):
                    self.assert_refused(route, {"body"}, data=b"{}", content_type=media_type)

    def test_size(self) -> None:
        """A body over 64 KiB is refused, with or without a declared length."""
        chunked = {"CONTENT_LENGTH": "", "wsgi.input_terminated": True}
        declared = {"CONTENT_LENGTH": str(10**12)}
        for environ, size in (({}, LIMIT + 1), (chunked, LIMIT + 1), (declared, 2)):
            for route in self.routes:
                with self.subTest(route, environ=environ), self.assert_nothing_changes():
                    body = io.BytesIO(b"{" + b" " * (size - 2) + b"}")
                    response = self.send(
                        route, input_stream=body, content_type=JSON, environ_overrides=environ
                    )

                    self.assert_error(response, errors.PayloadTooLarge)


class TestBodySlots(InputTestCase):
    """Bodies are read in a limited number of slots."""

    def setUp(self) -> None:
        """Let no request wait for a slot."""
        super().setUp()
        self.enterContext(mock.patch("project.api.requests.BODY_SLOT_TIMEOUT", 0.0))

    def refresh(self, body: bytes = b"{}") -> TestResponse:
        """Return the response to a body sent to /auth/refresh."""
        return self.send_raw("/auth/refresh", body)

    def fill(self) -> None:
        """Take every slot until the pushed context is popped."""
        slots: Bulkhead = self.app.extensions["body_bulkhead"]
        for _ in range(2 * self.app.config["GRANIAN_BLOCKING_THREADS"]):
            slots.enter()

    def test_full(self) -> None:
        """Without a free slot the response is Busy, before the body is read."""
        with self.app.app_context():
            self.fill()
            for body in (b"", b"{", b"x" * 70_000, b'{"refresh_token": "x"}'):
                response = self.refresh(body)

                self.assert_error(response, errors.Busy)
                self.assertEqual("1", response.headers["Retry-After"])

    def test_other_routes(self) -> None:
        """Slow bodies block no request without a body."""
        with self.app.app_context():
            self.fill()
            self.assertEqual(200, self.get("/ping").status_code)
            self.assertEqual(200, self.client.get("/auth/status", headers=self.caller).status_code)

    def test_slots_are_released(self) -> None:
        """Each request releases its slot, whatever its response."""
        with self.app.app_context():
            self.fill()
        refusals = {b"": 400, b"[": 400, b"{}": 400, b"x" * 70_000: 413}
        refusals |= {b'{"refresh_token": "x"}': 401}
        for body, status in refusals.items():
            for _ in range(2 * self.app.config["GRANIAN_BLOCKING_THREADS"]):
                self.assertEqual(status, self.refresh(body).status_code)

    def test_stalled_bodies_hold_no_hash_slot(self) -> None:
        """A login whose body has not come leaves its slot to hash to others."""
        slots = self.app.config["GRANIAN_BLOCKING_THREADS"]
        begun, over = threading.Semaphore(0), threading.Event()

        class Stalled(io.BytesIO):
            def readinto(self, _buffer: object, /) -> int:
                begun.release()
                over.wait(10)
                return 0

        with ThreadPoolExecutor(slots) as threads:
            try:
                for _ in range(slots):
                    threads.submit(
                        self.app.test_client().post,
                        "/auth/login",
                        input_stream=Stalled(),
                        environ_overrides={"CONTENT_LENGTH": "", "wsgi.input_terminated": True},
                    )
                for _ in range(slots):
                    self.assertTrue(begun.acquire(timeout=10))
                login = self.login("caller@test.com", "caller's password")
            finally:
                over.set()

        self.assertEqual(200, login.status_code)


class TestIds(BaseTestCase):
    """An id in a path has exactly one spelling."""

    def test_valid(self) -> None:
        """The smallest and the largest id are found."""
        for number in (1, 2**31 - 1):
            with self.subTest(number):
                add_user(f"user{number}", f"{number}@test.com", "test", id=number)

                self.assertEqual(number, self.get(f"/users/{number}").get_json()["data"]["id"])

    def test_invalid(self) -> None:
        """Any other text is an unknown user."""
        add_user("test", "test@test.com", "test", id=12)
        around = ["012", "0012", "+12", "-12", "12.0", "12e0", "1_2", "12,12", "12;", " 12", "12 "]
        control = ["12\n", "\n12", "12\0", "\t12"]
        others = ["0", "-0", "00", "blah", "null", "0xc", "١٢", "\uff11\uff12", "²", "é", "*", "%"]
        large = [str(2**31 - 1), str(2**31), str(2**32 + 12), str(2**64 + 12), "9" * 5_000]
        quoted = map(quote, [*around, *control, *others, *large])
        for path in [*quoted, "%ff", "12%ff", "%c0%b1", "%ed%a0%80"]:
            with self.subTest(path[:30]):
                response = self.get(f"/users/{path}")

                self.assert_error(response, errors.UserNotFound)


class TestAuthorization(BaseTestCase):
    """The Authorization header is a scheme, one blank and a token."""

    def test_forms(self) -> None:
        """The scheme is accepted in any case; any other difference makes the token invalid."""
        self.move_clock(0)
        token = self.register()
        for scheme in ("Bearer", "bearer", "BEARER", "bEaReR"):
            with self.subTest(scheme):
                headers = {"Authorization": f"{scheme} {token}"}
                self.assertEqual(200, self.client.get("/auth/status", headers=headers).status_code)
        words = ["Basic ", "Token ", "JWT ", "Bear ", "Bearer: ", "", " ", "Bearer", "Bearer="]
        blanks = ["Bearer  ", "Bearer\t", " Bearer ", "Bearer Bearer ", "Bearer é", 'Bearer "']
        ends = [
            " ",
            f" {token}",
            " x",
            f",Bearer {token}",
            f", Bearer {token}",
            ";",
            '"',
            "\xa0",
            "\t",
        ]
        forms = [word + token for word in [*words, *blanks]]
        forms += [f"Bearer {token}{end}" for end in ends]
        bare = ["", " ", "Bearer", "Bearer ", "Bearer  ", "Bearer null", "Basic dGVzdDp0ZXN0", "é"]
        for value in [*forms, *bare]:
            for path in ("/auth/status", "/auth/logout"):
                with self.subTest(value, path=path):
                    response = self.client.get(path, headers={"Authorization": value})

                    self.assert_error(response, errors.TokenInvalid)

    def test_two_headers(self) -> None:
        """Two headers are refused, even when both have a valid token."""
        value = f"Bearer {self.register()}"
        headers = [("Authorization", value), ("Authorization", value)]

        response = self.client.get("/auth/status", headers=headers)

        self.assert_error(response, errors.TokenInvalid)

    def test_comes_before_the_query(self) -> None:
        """The token is checked before the query."""
        missing = self.get("/auth/logout?scope=nobody")
        invalid = self.get("/auth/logout?scope=nobody", "invalid")

        self.assert_error(missing, errors.LogoutTokenMissing)
        self.assert_error(invalid, errors.TokenInvalid)
