"""Names, ports and variables by which ranks find each other."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence

from align_kit import machine
from align_kit.doctor.finding import BAD, NOTE, WARN, Finding, ok
from align_kit.errors import UserError

COMMON_PORT = 29500  # what torchrun, accelerate and `align-kit launch --nnodes` take where none is named
LOOKUP_SECONDS = 3.0
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def port() -> Finding:
    """Can ranks get a port, and is the common one free?"""
    free = machine.free_port()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just been left is free
        try:
            probe.bind(("", COMMON_PORT))
        except OSError as error:
            said = f"{COMMON_PORT} cannot be had ({error.strerror}), {free} can"
            return Finding(NOTE, said, "on one machine a free one is taken; on several give --master_port")
    return ok(f"{COMMON_PORT} is free")


def hostname(environ: Mapping[str, str]) -> Finding:
    """Does this machine's name stand for an address of its own? gloo listens there where no interface is named."""
    name = socket.gethostname()
    found = _addresses(name)
    listed = ", ".join(found or ())
    if found is None:
        what = f"{name}: no answer within {LOOKUP_SECONDS:.0f} s"
    elif not found:
        what = f"{name} stands for no address"
    elif not set(found) & _own_addresses():
        what = f"{name} is {listed}, which is no address of this machine"
    elif all(address.startswith("127.") or address == "::1" for address in found):
        return ok(f"{name} is {listed}: enough for one machine, for several set GLOO_SOCKET_IFNAME")
    else:
        return ok(f"{name} is {listed}")
    if environ.get("GLOO_SOCKET_IFNAME"):
        return Finding(NOTE, what, "GLOO_SOCKET_IFNAME is used instead")
    remedy = "add it to /etc/hosts or let GLOO_SOCKET_IFNAME name the interface, or several machines cannot meet"
    return Finding(WARN, what, remedy)


def _addresses(name: str) -> list[str] | None:
    """Return the addresses of a name, none where it has none, and `None` where nobody answers in time."""
    answers: list[list[str]] = []

    def ask() -> None:
        try:
            answers.append(sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)}))
        except OSError:
            answers.append([])

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(LOOKUP_SECONDS)
    return answers[0] if answers else None


def _own_addresses() -> set[str]:
    import psutil

    found = {address.address.partition("%")[0] for link in psutil.net_if_addrs().values() for address in link}
    return found | {f"127.0.{third}.1" for third in (0, 1)}  # all of 127/8 is this machine; Debian names 127.0.1.1


def variables(environ: Mapping[str, str]) -> Finding:
    """Do the variables that a launcher sets belong together, and do the interfaces exist that others name?"""
    import psutil

    try:
        machine.prepare_process(dict(environ))
    except UserError as error:
        return Finding(BAD, str(error))
    links = psutil.net_if_addrs()
    for variable in INTERFACES:
        if missing := _missing(variable, environ.get(variable, ""), list(links)):
            return Finding(BAD, f"{variable} names {missing}, which is no interface", f"there are {', '.join(links)}")
    left = [name for name in machine.LAUNCHER if name in environ]
    if left and "RANK" not in environ:
        said = f"{', '.join(left)} set without RANK"
        return Finding(NOTE, said, "left from another launcher? a run that is started alone takes no notice")
    return ok("none set" if "RANK" not in environ else f"rank {environ['RANK']} of {environ['WORLD_SIZE']}")


def _missing(variable: str, given: str, links: Sequence[str]) -> str | None:
    """Return what of a list of interfaces does not exist. NCCL also takes beginnings, `=` and, for all but, `^`."""
    if not given or given.startswith("^"):
        return None
    whole = variable != "NCCL_SOCKET_IFNAME" or given.startswith("=")
    for name in given.removeprefix("=").split(","):
        if not any(link == name or (not whole and link.startswith(name)) for link in links):
            return name
    return None
