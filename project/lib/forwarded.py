"""The proxies in front of the service, and what they say of whom they speak for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from project import addresses

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


def believe(app: WSGIApplication, hops: int) -> WSGIApplication:
    """Return `app`, told the client's address and scheme by the last `hops` proxies (1 or more).

    Each proxy writes the address it was called from behind what it was sent in X-Forwarded-For, so
    the client's is the entry `hops` from the right; whatever stands left of it anybody may have
    written. Where there is no such entry, or it is no IP address, the address stays that of the
    peer, which is known: who garbles theirs counts as the proxy, and never as somebody else.

    X-Forwarded-Proto is more often set anew than added to: the outermost proxy that speaks of the
    scheme is believed, and what it does not call https is none.

    Werkzeug's ProxyFix takes the header for a list of quoted strings, takes any text for an
    address, and lets a client hide behind the proxy with a single quotation mark.
    """

    def told(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        entries = environ.get("HTTP_X_FORWARDED_FOR", "").split(",")
        if len(entries) >= hops and (client := addresses.parse(entries[-hops])):
            environ["REMOTE_ADDR"] = client
        if schemes := environ.get("HTTP_X_FORWARDED_PROTO"):
            outermost = schemes.split(",")[-hops:][0].strip(" \t").lower()
            environ["wsgi.url_scheme"] = "https" if outermost == "https" else "http"
        return app(environ, start_response)

    return told
