"""A client of the users service, to copy. It needs Python 3.11 and nothing else.

    client = Client("https://users.example")
    client.log_in("ada@example.com", "correct horse battery")
    print(client.call("GET", "/auth/status")["data"])
    client.log_out()

It refreshes its tokens before they expire, and waits when the service asks it to wait.
"""

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from time import sleep, time
from typing import Any

TRIES = 4  # of a request that is answered 429 or 503
LONGEST_WAIT = 30  # seconds; a longer Retry-After is left to the caller
TIMEOUT = 7  # seconds; so four tries of a lost refresh fit into the 30 s of the service
RENEWABLE = {"token_expired", "token_invalid"}  # codes after which a refresh may help

Json = dict[str, Any]
Save = Callable[[Json | None], object]


class ApiError(Exception):
    """A refusal. `code` is for programs, and the text of the exception is for people.

    A `status` of 401 means that the user has to log in.
    """

    def __init__(self, status: int, body: Json, retry_after: int | None = None) -> None:
        super().__init__(body.get("message", f"HTTP status {status}"))
        self.status = status
        self.code: str = body.get("code", "")
        self.errors: dict[str, str] = body.get("errors", {})  # the problem with each field
        self.retry_after = retry_after  # seconds


class Client:
    """The session of one user, which threads may share.

    `save` is called with each new token pair, and with None when the session is over. Pass the
    last pair as `pair` to continue the session later. Each process needs a session of its own.
    """

    def __init__(self, url: str, pair: Json | None = None, save: Save = lambda pair: None) -> None:
        self._url, self._pair, self._save = url, pair, save
        self._lock = threading.Lock()  # held while the pair is replaced

    def log_in(self, email: str, password: str, code: str | None = None) -> None:
        """Start a session.

        An ApiError with the code mfa_required asks for a code, of the authenticator or a recovery
        code: log in again with it.
        """
        body = {"email": email, "password": password} | ({"code": code} if code else {})
        with self._lock:
            self._get_pair("/auth/login", body)

    def log_out(self) -> None:
        """End the session. The pair is forgotten even if the service cannot be reached."""
        try:
            self.call("POST", "/auth/logout")
        finally:
            self._forget()

    def call(self, method: str, path: str, body: Json | None = None) -> Json:
        """Send a request with a valid token, and return the response."""
        token = self._valid_token()
        try:
            return self._send(method, path, body, token)
        except ApiError as error:
            if error.code not in RENEWABLE:
                if error.status == 401:
                    self._forget(token)
                raise
        return self._send(method, path, body, self._valid_token(rejected=token))

    def _valid_token(self, rejected: str | None = None) -> str:
        """Return the auth_token. The first of many threads refreshes it, and the others wait."""
        with self._lock:
            if self._pair is None:
                raise ApiError(401, {"code": "token_missing", "message": "Please log in."})
            if self._pair["auth_token"] == rejected or time() >= self._pair["refresh_at"]:
                self._get_pair("/auth/refresh", {"refresh_token": self._pair["refresh_token"]})
            return str(self._pair["auth_token"])

    def _get_pair(self, path: str, body: Json) -> None:
        """Get a new pair and store it before its auth_token is used."""
        sent_at = time()
        try:
            answer = self._send("POST", path, body)
        except ApiError as error:
            if error.status == 401:
                self._store(None)
            raise
        # Refresh before the auth_token expires, and long before the refresh_token does: the user
        # may be away for weeks.
        lifetime: float = answer["expires_in"]
        refresh_in = min(0.9 * lifetime, answer.get("refresh_expires_in", lifetime) / 2)
        pair = {name: answer[name] for name in ("auth_token", "refresh_token")}
        self._store(pair | {"refresh_at": sent_at + refresh_in})

    def _store(self, pair: Json | None) -> None:
        self._pair = pair
        self._save(pair)

    def _forget(self, token: str | None = None) -> None:
        """Forget the pair. With `token`, keep a pair that has replaced the one of that token."""
        with self._lock:
            if self._pair is not None and token in {None, self._pair["auth_token"]}:
                self._store(None)

    def _send(self, method: str, path: str, body: Json | None, token: str | None = None) -> Json:
        """Send a request, and repeat it if the service asks for that or a refresh is lost."""
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        for _ in range(TRIES - 1):
            try:
                return _answer(request)
            except ApiError as error:
                if error.retry_after is None or error.retry_after > LONGEST_WAIT:
                    raise
                sleep(error.retry_after)
            except (OSError, http.client.HTTPException):  # no response, or a part of one
                if path != "/auth/refresh":
                    raise
        return _answer(request)


def _answer(request: urllib.request.Request) -> Json:
    """Return the JSON of a response. Raise ApiError for a refusal."""
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        with error:
            text = error.read()
        # The refusal of a proxy may have another type.
        body = json.loads(text) if error.headers.get_content_subtype() == "json" else {}
        seconds = error.headers.get("Retry-After", "")
        repeatable = error.code in {429, 503} and seconds.isdecimal()
        raise ApiError(error.code, body, int(seconds) if repeatable else None) from None
