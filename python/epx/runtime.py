"""Buffer.runtime: the small object that some programs ask about domains and devices."""
import weakref


class Runtime:
    """Facts of one buffer. "RDMA rank" is deep_ep's word for a domain's number."""

    def __init__(self, buffer):
        self._buffer = weakref.ref(buffer)
        self._core = buffer._core

    def is_available(self):
        """True until destroyed."""
        return bool(self._core.buffer) and not self._core.closing

    def get_num_rdma_ranks(self):
        """How many domains there are."""
        return self._core.domains

    def get_rdma_rank(self):
        """This rank's domain."""
        return self._core.domain

    def get_root_rdma_rank(self, is_global):
        """The root's rank: of this rank's place in its domain (global), else 0."""
        return self._core.domain_index if is_global else 0

    def get_local_device_id(self):
        """GPU number; -1 on CPU."""
        return self._core.device

    def get_comm_stream(self):
        """See Buffer.get_comm_stream."""
        buffer = self._buffer()
        return buffer.get_comm_stream() if buffer is not None else None

    def get_local_nvshmem_unique_id(self):
        """A fresh unique id, as bytes (the bootstrap of epx; see epx.unique_id)."""
        from ._unique_id import unique_id
        return unique_id()

    def destroy(self):
        """See Buffer.destroy."""
        buffer = self._buffer()
        if buffer is not None:
            buffer.destroy()
        else:
            self._core.close()
