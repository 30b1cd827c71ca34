"""Norm, rotation and offset of queries and keys: our kernels against eager and compiled PyTorch and Liger-Kernel.

`python -m tests.bench_rotary --out FILE.csv`. T = 16,384, 32,768, 49,152 tokens (a part in the record's stages), 6
heads of 128. Columns: tests/bench.py, and peak_gb.

- kernels `plain`, `paired`, `offset` (the record's three kinds of layers), forward, and `..._gradient`: forward and
  backward together. Versions: `ours` (fused_rotary_heads), `eager` and `compiled` (plain_rotary_heads)
- `liger`, of `plain` only: LigerRMSNorm of queries and keys, then its RoPE, which turns halves. It is given queries and
  keys as tensors of their own and has nothing to do with values
- floor: 36 vectors of a head read or written for each token, 84 with gradients; without values 24 and 60
- error: of all results against fp64, 2,048 tokens; of `liger` against its own function
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from speedrun_lib.fused_rotary import fused_rotary_heads, plain_rotary_heads
from speedrun_lib.rotary import rotary_frequencies, rotary_table
from tests.bench import command_line, compiled, liger, off, rows_of, with_gradients

TOKENS, HEADS, HEAD_DIM, CHECKED = (16_384, 32_768, 49_152), 6, 128, 2048
KINDS = {"plain": (False, False), "paired": (True, False), "offset": (False, True)}
EPSILON = torch.finfo(torch.float32).eps


def halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    "Normed and turned, dimension i together with i + k/2; x is (1, t, h, k)."
    x = F.rms_norm(x, x.shape[-1:], eps=EPSILON)
    left, right = x.chunk(2, dim=-1)
    cos, sin = (y[: x.shape[1], None] for y in (cos, sin))
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def plain_halves(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    "What Liger-Kernel's functions compute."
    return halves(q, cos, sin), halves(k, cos, sin)


def liger_heads(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    "The same by its kernels, which work in place."
    norm = liger("LigerRMSNorm")(HEAD_DIM, eps=EPSILON, elementwise_affine=False)
    q, k = liger("liger_rotary_pos_emb")(*(norm(x).transpose(1, 2) for x in (q, k)), cos[None], sin[None])
    return q.transpose(1, 2), k.transpose(1, 2)


def with_tables(function: Callable, tables: tuple) -> Callable:
    "The function of its inputs alone."
    return lambda *inputs: function(*inputs, *tables)


def error_of(function: Callable, exact: Callable, inputs: tuple, grads: list[torch.Tensor], tables: tuple) -> float:
    "Of outputs and gradients."
    few, few_grads = ([x[:, :CHECKED].clone() for x in each] for each in (inputs, grads))
    tables = [x[: 2 * CHECKED] for x in tables]
    right = with_gradients(with_tables(exact, [x.double() for x in tables]), [x.double() for x in few],
                           [x.double() for x in few_grads])
    found = with_gradients(with_tables(function, tables), few, few_grads)
    return off(*(torch.cat([x.flatten() for x in each]) for each in (found, right)))


def rows_for(tokens: int, kind: str) -> Iterator[dict]:
    "One kind of layer."
    torch.manual_seed(0)
    paired, offset = KINDS[kind]
    tables = tuple(x.cuda() for x in rotary_table(rotary_frequencies(HEAD_DIM, 1024.0), tokens * (1 + paired)))
    qkv = torch.randn(1, tokens, 3 * HEADS, HEAD_DIM, device="cuda").bfloat16()
    grads = [torch.randn(1, tokens, HEADS, HEAD_DIM, device="cuda").bfloat16() for _ in range(3)]

    def plain(qkv, cos, sin):
        return plain_rotary_heads(qkv, cos, sin, paired, offset)

    def ours(qkv, cos, sin):
        return fused_rotary_heads(qkv, cos, sin, paired, offset)

    # function, what it should compute, inputs, gradients of its outputs, tables, vectors that move (with gradients)
    ways = {version: (function, plain, (qkv,), grads, tables, 36, 84)
            for version, function in (("ours", ours), ("eager", plain), ("compiled", compiled(plain)))}
    if liger("LigerRMSNorm") and kind == "plain":
        apart = tuple(x.contiguous() for x in qkv.chunk(3, dim=-2)[:2])
        halved = tuple(x[:, ::2].abs().repeat(1, 2) for x in tables)
        ways["liger"] = liger_heads, plain_halves, apart, [x.clone() for x in grads[:2]], halved, 24, 60
    vector, shape, forward, both = 2.0 * HEAD_DIM * tokens, (tokens, HEADS, HEAD_DIM), {}, {}
    for version, (function, exact, inputs, own_grads, own_tables, few, many) in ways.items():
        call = with_tables(function, own_tables)
        forward[version] = functools.partial(call, *inputs), None, {"moved": few * vector}
        both[version] = (functools.partial(with_gradients, call, inputs, own_grads),
                         functools.partial(error_of, function, exact, inputs, own_grads, own_tables),
                         {"moved": many * vector})
    yield from rows_of(kind, shape, forward)
    yield from rows_of(f"{kind}_gradient", shape, both)


def measure() -> list[dict]:
    "All rows."
    return [row for tokens in TOKENS for kind in KINDS for row in rows_for(tokens, kind)]


if __name__ == "__main__":
    command_line(__doc__, measure)
