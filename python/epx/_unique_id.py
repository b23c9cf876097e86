"""Names of rendezvous."""
from . import _abi


def unique_id(address=None):
    """128 bytes that name a new rendezvous, for ``Buffer(unique_id=..., rank=..., ranks=...)`` on every rank.

    Make it in the process of rank 0 and send it to the others by any means; it holds a secret token.
    address   numeric IP to listen on; None is 127.0.0.1
    """
    out = _abi.UniqueId()
    _abi.check(_abi.library().epx_unique_id_create(address.encode() if address else None, _abi.byref(out)))
    return bytes(out.bytes)
