"""Addresses, as far as they tell one client from another."""

import ipaddress


def network(ip: str | None) -> str:
    """Return what an address counts as: an IPv6 one as its /64, which is one household's."""
    try:
        address = ipaddress.ip_address(ip or "")
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address), 64), strict=False))
    return str(address)
