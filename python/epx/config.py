"""Config: the tuning object of the deep_ep interface."""
from .errors import whole

_TOKENS = 4096  # tokens of one dispatch that the size hints are made for
_SIDE_BYTES = 512  # scales, ids and weights of a token, generously


class Config:
    """How many SMs a call may use, and chunk sizes.

    epx uses ``num_sms`` on GPUs. The chunk sizes are kept, so that they can be read back, and not needed: rows go
    straight to their final place. Any values are taken, and any number of ranks.
    """

    def __init__(self, num_sms=20, num_max_nvl_chunked_send_tokens=6, num_max_nvl_chunked_recv_tokens=256,
                 num_max_rdma_chunked_send_tokens=6, num_max_rdma_chunked_recv_tokens=256):
        self.num_sms = whole("num_sms", num_sms)
        self.num_max_nvl_chunked_send_tokens = whole("num_max_nvl_chunked_send_tokens", num_max_nvl_chunked_send_tokens)
        self.num_max_nvl_chunked_recv_tokens = whole("num_max_nvl_chunked_recv_tokens", num_max_nvl_chunked_recv_tokens)
        self.num_max_rdma_chunked_send_tokens = whole("num_max_rdma_chunked_send_tokens", num_max_rdma_chunked_send_tokens)
        self.num_max_rdma_chunked_recv_tokens = whole("num_max_rdma_chunked_recv_tokens", num_max_rdma_chunked_recv_tokens)

    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        """Window bytes (int > 0) with room for two dispatches of 4096 tokens of `hidden_bytes` on every rank.

        With less, large results come in ordinary tensors: slower, never wrong.
        """
        ranks = min(max(int(num_ranks), 1), 8)
        return _TOKENS * ranks * (int(hidden_bytes) + _SIDE_BYTES) * 2

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        """Window bytes (int > 0) for rows on their way between domains."""
        return max(32 << 20, 256 * max(int(num_ranks), 1) * (int(hidden_bytes) + _SIDE_BYTES))

    def __repr__(self):
        return ("Config(num_sms=%d, num_max_nvl_chunked_send_tokens=%d, num_max_nvl_chunked_recv_tokens=%d, "
                "num_max_rdma_chunked_send_tokens=%d, num_max_rdma_chunked_recv_tokens=%d)" %
                (self.num_sms, self.num_max_nvl_chunked_send_tokens, self.num_max_nvl_chunked_recv_tokens,
                 self.num_max_rdma_chunked_send_tokens, self.num_max_rdma_chunked_recv_tokens))
