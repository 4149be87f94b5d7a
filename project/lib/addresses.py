"""IP addresses: parsing, and the network that an address is counted as."""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address

_IPV6_NETWORK_BITS = 64
# Some proxies write 192.0.2.1:5000, [2001:db8::1], [2001:db8::1]:5000.
_WITH_PORT = re.compile(r"\[(?P<six>.*:.*)\](:[0-9]+)?|(?P<four>[0-9.]+):[0-9]+")


def parse(text: str) -> str | None:
    """Return the IP address in `text` in the form of RFC 5952, or None if it is not an IP address.

    A port is dropped. An IPv4-mapped IPv6 address (RFC 4291, 2.5.5.2), which is what a dual-stack
    socket reports for an IPv4 client, becomes the IPv4 address.
    """
    address = _address(text)
    return None if address is None else str(address)


def network(ip: str | None) -> str:
    """Return the network under which `ip` is counted when requests are limited per address.

    This is the whole address for IPv4, and the /64 for IPv6: a customer is assigned at least a /64
    (RFC 6177) and can use any address in it (RFC 8981). Everything that is not an IP address
    shares the network "", so that hiding an address does not evade a limit.
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
    if match := _WITH_PORT.fullmatch(text):
        text = match["six"] or match["four"]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:  # fe80::1%eth0: any text may follow the %
            return None
        return address.ipv4_mapped or address
    return address
