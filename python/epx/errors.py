"""What can go wrong: one class per status code of the C library.

Every class is an ``epx.Error`` (a RuntimeError). ``str(error)`` is the library's own words, ``error.status`` the
number and ``error.name`` the code, "EPX_E_PEER" for instance.
"""
import operator


class Error(RuntimeError):
    """Anything that epx refuses or that failed in it."""

    status = -1
    name = "EPX_E_?"


class InvalidArgument(Error, ValueError):
    """An argument is wrong; nothing was done. The words name the argument."""

    status, name = 1, "EPX_E_INVALID"


class OutOfMemory(Error):
    """Memory ran out."""

    status, name = 2, "EPX_E_NOMEM"


class Busy(Error):
    """A pool is used up: too many handles or leases alive."""

    status, name = 3, "EPX_E_BUSY"


class Timeout(Error):
    """A peer did not do its part before the deadline."""

    status, name = 4, "EPX_E_TIMEOUT"


class PeerFailure(Error):
    """A peer failed or is gone."""

    status, name = 5, "EPX_E_PEER"


class Mismatch(Error):
    """The ranks disagree: build, configuration, or order of operations."""

    status, name = 6, "EPX_E_MISMATCH"


class Broken(Error):
    """This buffer failed before (or was destroyed); it can only be destroyed."""

    status, name = 7, "EPX_E_BROKEN"


class Unsupported(Error):
    """Not available on this machine or in this build."""

    status, name = 8, "EPX_E_UNSUPPORTED"


class SystemFailure(Error):
    """The operating system refused a call."""

    status, name = 9, "EPX_E_SYSTEM"


class DeviceFailure(Error):
    """The device or its driver refused a call."""

    status, name = 10, "EPX_E_DEVICE"


class NetFailure(Error):
    """The network refused a call or lost a connection."""

    status, name = 11, "EPX_E_NET"


class Overflow(Error):
    """More rows came than there is room for."""

    status, name = 12, "EPX_E_OVERFLOW"


class BadData(Error):
    """Data that only the device knew was wrong, an expert id for instance."""

    status, name = 13, "EPX_E_DATA"


BY_STATUS = {c.status: c for c in (InvalidArgument, OutOfMemory, Busy, Timeout, PeerFailure, Mismatch, Broken,
                                   Unsupported, SystemFailure, DeviceFailure, NetFailure, Overflow, BadData)}


def refuse(words):
    """Raise InvalidArgument with ``words``."""
    raise InvalidArgument(words)


def whole(name, value, least=0):
    """`value` (an int, or what stands for one: numpy's, for instance) as an int of at least `least`."""
    if type(value) is int and value >= least:
        return value
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise InvalidArgument("%s: %r; it is a number from %d" % (name, value, least))
    return number
