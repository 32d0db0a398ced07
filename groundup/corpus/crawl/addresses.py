"""Which network addresses may be connected to: public ones, unless the user allows the others.

The rule is asked when a socket is about to be made, with the address that the name was resolved to, so that neither
a redirect, nor a name of a private machine, nor a name that changes its address between two look-ups (DNS rebinding)
leads into the user's own network.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

from groundup.corpus.crawl.settings import Refusal

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")


class PrivateAddress(OSError):
    """A connection to an address that is not public was refused."""

    def __str__(self) -> str:
        return f"{Refusal.PRIVATE} {self.args[0]}"


def is_public(address: str) -> bool:
    """Whether an IP address (text, perhaps with an IPv6 zone) belongs to the public internet.

    IPv6 addresses that carry an IPv4 address (mapped, 6to4, Teredo, NAT64) are as public as both are.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
        if parsed.is_site_local or parsed in _LOCAL_NAT64:
            return False
        carried = [parsed.sixtofour, *(parsed.teredo or ())]
        if parsed in _NAT64 or int(parsed) >> 32 == 0:
            carried.append(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF))
        if any(inner is not None and not is_public(str(inner)) for inner in carried):
            return False
    return parsed.is_global and not parsed.is_multicast


def socket_factory(allow_private: bool) -> Callable[[Any], socket.socket]:
    """What makes the sockets of aiohttp's connector: for a resolved address, a socket or a refusal.

    Raises (the made function):
        PrivateAddress: the address is not public, and only public ones are allowed.
    """

    def make(address_info: Any) -> socket.socket:
        family, kind, protocol, _, address = address_info
        if not allow_private and not is_public(str(address[0])):
            raise PrivateAddress(address[0])
        return socket.socket(family, kind, protocol)

    return make
