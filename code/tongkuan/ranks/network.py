"""By which network interface other hosts are reached."""

import fcntl
import socket
import struct
import time
from contextlib import suppress
from pathlib import Path

ADDRESS_OF = 0x8915  # SIOCGIFADDR
ELSEWHERE = "192.0.2.1"  # of RFC 5737: leads where all else does. Nothing is sent there
LOOPBACK = ("127.", "::1")


def interface_to(host: str, port: int) -> str:
    """Name of the interface that leads to a host, by which ranks can meet; empty when it cannot be told.

    gloo would take the one of this host's own name, 127.0.1.1 by Debian's /etc/hosts, where no other host comes.
    """
    own = own_address(host, port)
    if own.startswith(LOOPBACK) and host not in ("localhost", "127.0.0.1", "::1"):  # this host, by its name
        own = own_address(ELSEWHERE, port) or own
    return next((name for _, name in socket.if_nameindex() if own and own in addresses_of(name)), "")


def is_here(host: str) -> bool:
    """Whether a host is this one, as far as its name can be resolved."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as trial:
                trial.bind(address)
                return True
    return False


def await_listener(host: str, port: int, deadline: float) -> str:
    """Return when somebody listens there: nothing, or what was wrong until the deadline (of time.monotonic).

    torch's store would wait as well, and print a page of C++ when nobody comes.
    """
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))):
                return ""
        except OSError as error:
            if time.monotonic() > deadline:
                return str(error.strerror or error)
        time.sleep(0.1)


def is_taken(error: RuntimeError) -> bool:
    """Whether a store could not listen, since another program does."""
    return "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()


def own_address(host: str, port: int) -> str:
    """The address from which packets go to a host, empty when none do."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing
                return str(probe.getsockname()[0])
    return ""


def addresses_of(name: str) -> list[str]:
    """Of an interface."""
    found = []
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        answer = fcntl.ioctl(asking, ADDRESS_OF, struct.pack("256s", name.encode()[:15]))
        found.append(socket.inet_ntoa(answer[20:24]))
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            number, *_, owner = line.split()
            if owner == name:
                found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(number)))
    return found
