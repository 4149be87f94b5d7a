"""The client address and scheme that trusted proxies report in X-Forwarded-* headers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from project.lib import addresses

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


def trust_proxies(app: WSGIApplication, hops: int) -> WSGIApplication:
    """Return `app` with the client's address and scheme taken from `hops` proxies (1 or more).

    Each proxy appends the address of its peer to X-Forwarded-For, so the client's address is the
    entry `hops` from the right. A client can forge the entries to the left of it. If the entry is
    missing or is not an IP address, REMOTE_ADDR keeps the address of the peer: a client with a
    malformed header is counted as the proxy, never as another client.

    Most proxies replace X-Forwarded-Proto rather than append to it. The outermost of the trusted
    proxies that reports a scheme is believed, and every scheme other than https counts as http.

    Werkzeug's ProxyFix parses the header as a list of quoted strings and accepts any text as an
    address, so a client could hide behind the proxy with a single quotation mark.
    """

    def trusting_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        entries = environ.get("HTTP_X_FORWARDED_FOR", "").split(",")
        if len(entries) >= hops and (client := addresses.parse(entries[-hops])):
            environ["REMOTE_ADDR"] = client
        if schemes := environ.get("HTTP_X_FORWARDED_PROTO"):
            outermost = schemes.split(",")[-hops:][0].strip(" \t").lower()
            environ["wsgi.url_scheme"] = "https" if outermost == "https" else "http"
        return app(environ, start_response)

    return trusting_app
