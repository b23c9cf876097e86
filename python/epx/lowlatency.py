"""The low-latency calls of Buffer."""
from .errors import Unsupported, refuse


def _missing():
    raise Unsupported("the low-latency calls are not in this build of libepx.so (it has no epx_ll_dispatch); "
                      "dispatch() and combine() work")


class LowLatency:
    """Mixed into Buffer."""

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts):
        """Bytes (int > 0) that the low-latency calls need: two slots of M tokens from every rank, rows and side data,
        there and back. It does not grow with the number of experts."""
        m, h, r = int(num_max_dispatch_tokens_per_rank), int(hidden), int(num_ranks)
        if m < 1 or h < 1 or r < 1 or num_experts < 1:
            refuse("num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts: each from 1")
        row = 2 * h + 512
        return (2 * 2 * m * r * row + (1 << 20) - 1) >> 20 << 20

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank, hidden, num_experts):
        """There is nothing to clean: counters only grow and slots are reused once consumed."""

    def low_latency_dispatch(self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts,
                             cumulative_local_expert_recv_stats=None, dispatch_wait_recv_cost_stats=None, use_fp8=True,
                             round_scale=False, use_ue8m0=False, async_finish=False, return_recv_hook=False):
        """Raises Unsupported in this build."""
        _missing()

    def low_latency_combine(self, x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False,
                            async_finish=False, return_recv_hook=False, out=None, combine_wait_recv_cost_stats=None):
        """Raises Unsupported in this build."""
        _missing()

    def get_next_low_latency_combine_buffer(self, handle):
        """Raises Unsupported in this build."""
        _missing()

    def low_latency_update_mask_buffer(self, rank_to_mask, mask=False):
        """Raises Unsupported in this build."""
        _missing()

    def low_latency_query_mask_buffer(self, mask_status):
        """Raises Unsupported in this build."""
        _missing()

    def low_latency_clean_mask_buffer(self):
        """Raises Unsupported in this build."""
        _missing()
