"""Network addresses: which text is one, and what it counts as."""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address

_IPV6_NETWORK_BITS = 64
# What some proxies make of an address: 192.0.2.1:5000, [2001:db8::1], [2001:db8::1]:5000.
_DRESSED = re.compile(r"\[(?P<six>.*:.*)\](:[0-9]+)?|(?P<four>[0-9.]+):[0-9]+")


def parse(text: str) -> str | None:
    """Return the IP address that `text` is, as RFC 5952 writes it, or None when it is none.

    A port behind it is dropped. An IPv4-mapped IPv6 address (RFC 4291, 2.5.5.2), which is how a
    socket for both shows an IPv4 client, is that IPv4 address.
    """
    address = _address(text)
    return None if address is None else str(address)


def network(ip: str | None) -> str:
    """Return what `ip` counts as when requests are counted per address.

    IPv4 counts whole, IPv6 as its /64: a customer is given no less than that (RFC 6177) and takes
    any number of addresses in it (RFC 8981). What is no address is the network "", and counts
    together: nobody is let off for hiding theirs.
    """
    address = _address(ip or "")
    if address is None:
        return ""
    if isinstance(address, IPv4Address):
        return str(address)
    prefix = int(address) >> _IPV6_NETWORK_BITS << _IPV6_NETWORK_BITS
    return f"{IPv6Address(prefix)}/{_IPV6_NETWORK_BITS}"


def _address(text: str) -> IPv4Address | IPv6Address | None:
    text = text.strip(" \t")
    if dressed := _DRESSED.fullmatch(text):
        text = dressed["six"] or dressed["four"]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:  # fe80::1%eth0, where any text may follow the %
            return None
        return address.ipv4_mapped or address
    return address
