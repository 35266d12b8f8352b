"""A backward of attention that repeats its bits: Triton kernels, and their launches.

With S = scale · Q Kᵀ, P = exp(S − L), where L is the log of the sum of exponentials of a row of S,
and O = P V, the gradients are those of FlashAttention-2 (Dao 2023, algorithm 2): with
δ = rowsum(dO ∘ O) and dS = P ∘ (dO Vᵀ − δ), dV = Pᵀ dO, dK = scale · dSᵀ Q and dQ = scale · dS K.
One kernel owns keys and goes over the queries, the other owns queries and goes over the keys, so
that every sum is one program's, in one order. P and dO Vᵀ are computed twice for that: seven
products instead of five, and no atomics.

Tensors are [N, L, H, W] contiguous (samples, tokens, heads, width of a head), in 16 bit; L and δ
are [N, H, L] float32. Sums are float32, and P and dS are rounded to 16 bit for the products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.triton_launch import launch, on_device_of

LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """How a kernel is cut up and compiled."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class Plan(NamedTuple):
    """Tiles of the kernel that owns keys, and of the one that owns queries."""

    of_keys: Tile
    of_queries: Tile


PLANS = {
    64: Plan(Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
    128: Plan(Tile(32, 64, 4, 3), Tile(64, 32, 4, 3)),
}
"""By the width of a head, rounded up to a power of 2. The fastest on an H100, for widths 40, 64 and
80, of those that spill nothing when compiled for any GPU."""
ROWS = 64
"""Tokens of a program of δ."""
MOST_HEADS = 65535
"""Of all samples together: the second dimension of a grid."""


def plan_of(width: int) -> Plan | None:
    """Tiles for heads of this width; None where there are none."""
    return PLANS.get(max(64, triton.next_power_of_2(width)))


@triton.jit
def _rows_of(row, rows, heads, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Places of tokens of this program's sample and head, and which of their numbers exist."""
    sample, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    lane = tl.arange(0, DIM)
    token = sample.to(tl.int64) * rows + row
    place = (token * heads + head)[:, None] * WIDTH + lane[None, :]
    return place, (row < rows)[:, None] & (lane < WIDTH)[None, :]


@triton.jit
def _delta_kernel(
    y_ptr,
    dy_ptr,
    delta_ptr,
    queries,
    heads,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
):
    """δ = rowsum(dO ∘ O)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place, mask = _rows_of(row, queries, heads, WIDTH, DIM)
    y = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
    own = tl.program_id(1).to(tl.int64) * queries + row
    tl.store(delta_ptr + own, tl.sum(y * dy, axis=1), mask=row < queries)


@triton.jit
def _of_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dy_ptr,
    log_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    queries,
    keys,
    heads,
    scale,
    LOG2E: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
):
    """dK and dV of a tile of keys. Scores are [keys, queries], as the products need them."""
    dtype = k_ptr.dtype.element_ty
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    own, exists = _rows_of(key, keys, heads, WIDTH, DIM)
    k = tl.load(k_ptr + own, mask=exists, other=0.0)
    v = tl.load(v_ptr + own, mask=exists, other=0.0)
    dk = tl.zeros([KEYS, DIM], tl.float32)
    dv = tl.zeros([KEYS, DIM], tl.float32)
    row_of_head = tl.program_id(1).to(tl.int64) * queries
    for start in range(0, queries, QUERIES):
        query = start + tl.arange(0, QUERIES)
        place, mask = _rows_of(query, queries, heads, WIDTH, DIM)
        q = tl.load(q_ptr + place, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0)
        # beyond the end dO and δ are 0, and so is what is added
        log = tl.load(log_ptr + row_of_head + query, mask=query < queries, other=0.0)
        delta = tl.load(delta_ptr + row_of_head + query, mask=query < queries, other=0.0)
        s = tl.dot(k, tl.trans(q))
        p = tl.exp2(s * (scale * LOG2E) - (log * LOG2E)[None, :])
        dv = tl.dot(p.to(dtype), dy, dv)
        dp = tl.dot(v, tl.trans(dy))
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(dtype), q, dk)
    tl.store(dk_ptr + own, (dk * scale).to(dtype), mask=exists)
    tl.store(dv_ptr + own, dv.to(dtype), mask=exists)


@triton.jit
def _of_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dy_ptr,
    log_ptr,
    delta_ptr,
    dq_ptr,
    queries,
    keys,
    heads,
    scale,
    LOG2E: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
):
    """dQ of a tile of queries."""
    dtype = q_ptr.dtype.element_ty
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    own, exists = _rows_of(query, queries, heads, WIDTH, DIM)
    q = tl.load(q_ptr + own, mask=exists, other=0.0)
    dy = tl.load(dy_ptr + own, mask=exists, other=0.0)
    row = tl.program_id(1).to(tl.int64) * queries + query
    log = tl.load(log_ptr + row, mask=query < queries, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + row, mask=query < queries, other=0.0)
    dq = tl.zeros([QUERIES, DIM], tl.float32)
    for start in range(0, keys, KEYS):
        key = start + tl.arange(0, KEYS)
        place, mask = _rows_of(key, keys, heads, WIDTH, DIM)
        k = tl.load(k_ptr + place, mask=mask, other=0.0)
        v = tl.load(v_ptr + place, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k)) * (scale * LOG2E) - log[:, None]
        # a key that does not exist would have exp(−L), which may be infinite
        p = tl.exp2(tl.where((key < keys)[None, :], s, float("-inf")))
        dp = tl.dot(dy, tl.trans(v))
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(dtype), k, dq)
    tl.store(dq_ptr + own, (dq * scale).to(dtype), mask=exists)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    y: Tensor,
    log: Tensor,
    dy: Tensor,
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    Args:
        query, y, dy: [N, L, H, W], contiguous; `y` is the output, and `dy` its gradient.
        key, value: [N, K, H, W], contiguous.
        log: [N, H, L] float32, logs of sums of exponentials of the scaled scores.
        plan: tiles; by default those of the width.
    """
    samples, queries, heads, width = query.shape
    keys = key.shape[1]
    plan = plan_of(width) if plan is None else plan
    if plan is None:
        raise ValueError(f"heads must be no wider than {max(PLANS)}, got {width}")
    dim = max(64, triton.next_power_of_2(width))
    delta = torch.empty_like(log)
    dquery, dkey, dvalue = (torch.empty_like(x) for x in (query, key, value))
    given = (query, key, value, dy, log, delta)
    sizes = (queries, keys, heads, width**-0.5, LOG2E)

    def over(tokens: int, tile: int) -> tuple[int, int, int]:
        return triton.cdiv(tokens, tile), samples * heads, 1

    with on_device_of(query):
        constants: tuple[float, ...] = (queries, heads, ROWS, width, dim)
        launch(_delta_kernel, over(queries, ROWS), (y, dy, delta), constants, {"num_warps": 4})
        tile = plan.of_keys
        constants = (*sizes, tile.queries, tile.keys, width, dim)
        launch(
            *(_of_keys_kernel, over(keys, tile.keys), (*given, dkey, dvalue)),
            *(constants, tile.options),
        )
        tile = plan.of_queries
        constants = (*sizes, tile.queries, tile.keys, width, dim)
        launch(
            *(_of_queries_kernel, over(queries, tile.queries), (*given, dquery)),
            *(constants, tile.options),
        )
    return dquery, dkey, dvalue
