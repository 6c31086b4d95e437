"""What a collective puts on the wire, by the arithmetic of rings."""

from __future__ import annotations

# Bytes each rank sends for a byte of the tensor it hands in, by the number of ranks (Thakur 2005; NCCL's ring). An
# all-gather is handed a shard, a reduce-scatter and an all-reduce the whole.
RING = {
    "all_gather": lambda ranks: ranks - 1,
    "all_gather_coalesced": lambda ranks: ranks - 1,
    "all_gather_into_tensor": lambda ranks: ranks - 1,
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_reduce_coalesced": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_to_all_single": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: (ranks - 1) / ranks,
    "reduce": lambda ranks: (ranks - 1) / ranks,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "reduce_scatter_tensor": lambda ranks: (ranks - 1) / ranks,
}


def on_wire(collective: str, handed_in: float, ranks: int) -> float:
    """Return the bytes a rank sends, a mean over the ranks, where each hands `handed_in` bytes to `collective`."""
    return handed_in * float(RING[collective](ranks))
