# %% [markdown]
# # Triton: symmetric products and transposes
# > Half of X·Xᵀ is a mirror image of the other half: 171.7 → 169.0 s at record 27 (published, one log each).

# %%
#| default_exp symmetric

# %%
#| hide
import inspect
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from speedrun_lib.export import count_diff, diff_rungs
from speedrun_lib.history import load_samples, record_card
from speedrun_lib.page import COLORS, GREY, folded, play, use_style
from speedrun_lib.polar import polar_express
from speedrun_lib.runs import measured

os.environ["TRITON_INTERPRET"] = "1"  # from here on: kernels of this page run on a CPU
use_style()
OURS, CUBLAS = COLORS["muon"], COLORS["baseline"]

# %%
#| echo: false
record_card("27", "69", "74", "76", needs="Triton; a GPU to gain anything", runs="CPU, Triton's interpreter, about 10 s")

# %% [markdown]
# ## The picture
# A product of 768 x 768 numbers in tiles of 128 x 128, and one of 3072 x 3072. Only tiles on or below the diagonal are
# computed, numbered in the order in which they start; each is stored a second time, transposed, as its own mirror image
# (pale). 21 programs do the work of 36, 300 that of 576.

# %%
#| hide
def launch_order(tiles, group=8):
    "Row and column of each program's tile: `group` rows at a time, a rectangle by columns, then a triangle by rows."
    order = []
    for first in range(0, tiles, group):
        rows = range(first, min(first + group, tiles))
        order += [(i, j) for j in range(first) for i in rows] + [(i, j) for i in rows for j in range(first, i + 1)]
    return order


def order_image(tiles, group, marked=slice(0), shades=None):
    "Colours of a tile grid: early violet, late yellow, mirror images pale or, with few shades, grey; some tiles red."
    order = launch_order(tiles, group)
    image = np.full((tiles, tiles, 3), 0.9)
    for number, (i, j) in enumerate(order):
        late = number / len(order)
        late = int(late * shades) / (shades - 1) if shades else late
        image[i, j] = plt.cm.viridis(0.1 + 0.85 * late)[:3]
        if i != j and not shades:
            image[j, i] = 0.75 + 0.25 * image[i, j]
    for i, j in order[marked]:
        image[i, j] = 0.84, 0.15, 0.16
    return image


def draw_grid(ax, tiles, group, title, marked=slice(0), shades=None):
    "The grid of tiles."
    ax.imshow(order_image(tiles, group, marked, shades), interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=title)
    ax.grid(False)
    ax.spines[:].set_visible(False)


# %%
#| echo: false
fig, (left, right) = plt.subplots(1, 2, figsize=(6.5, 3.3))
draw_grid(left, 6, 8, "768: 21 of 36 tiles")
draw_grid(right, 24, 8, "3072: 300 of 576, in groups of 8 rows")
for number, (i, j) in enumerate(launch_order(6)):
    left.text(j, i, number, ha="center", va="center", color="white" if number < 14 else "#222222")
    if i != j:
        left.text(i, j, number, ha="center", va="center", color="#777777", fontsize=8)
for edge in (7.5, 15.5):
    right.plot([-0.5, edge + 8 if edge < 15 else 23.5], [edge, edge], color="white", lw=1)

# %% [markdown]
# ## The problem: a product computed twice
# [Polar Express](21_polar.ipynb) multiplies three times in each of its five iterations: A = X·Xᵀ, then b·A + c·A·A, then
# that times X. The first two are symmetric, yet a library computes both halves. At
# record 82's matrices (computed, 10¹² operations a step):

# %%
BANKS = {"MLP": (24, 3072, 768), "values, output": (20, 768, 768), "queries, keys": (60, 256, 768)}


def tera(n, r, c):
    "10^12 operations of one call of Polar Express: two symmetric products, and the rest."
    side, inner = min(r, c), max(r, c)
    return 10e-12 * n * side**2 * (inner + side), 10e-12 * n * side**2 * inner


work = pd.DataFrame({name: tera(*shape) for name, shape in BANKS.items()}, index=["symmetric", "other"]).T
work["computed twice"] = work.symmetric / 2 / work.sum(axis=1)
work.loc["all"] = [*work.sum()[:2], work.symmetric.sum() / 2 / work[["symmetric", "other"]].sum().sum()]
work.style.format("{:.2f}").format("{:.0%}", subset="computed twice")

# %% [markdown]
# More than a quarter of all operations of the optimizer's heaviest part. No library call skips them for a stack of bf16
# matrices, so records 27 (@byronxu99) and 74 (@ChrisJMcCormick) write kernels; 69 (@EmmettBicker, AI system Aster) tunes.
#
# ## Triton from zero
# A GPU runs the same function many times at once, on some hundred processors (132 on an H100). In CUDA one writes what
# each *thread* does, in [Triton](https://triton-lang.org) what each *program* does: one block of numbers. Triton compiles
# the function when it is first called, or, with `TRITON_INTERPRET=1`, runs it slowly in NumPy: that is how this page
# calls real kernels without a GPU.

# %%
#| export
import contextlib
import functools
import os
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from speedrun_lib.polar import plain_gram, plain_quintic

# %%
#| export
try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this system: the kernels below are plain functions that nobody calls
    triton, tl = SimpleNamespace(jit=lambda f: f), SimpleNamespace(constexpr=int)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton looks once as well, at each `jit`


@functools.cache  # asking the driver takes longer than many a kernel
def capability_of(device: torch.device) -> tuple[int, int]:
    "Compute capability of a GPU; (0, 0) for a CPU."
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def processors(device: torch.device) -> int:
    "Streaming multiprocessors of a GPU; 1 for a CPU."
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1

# %%
#| export
def takes_triton(x: Tensor) -> bool:
    "Whether Triton runs kernels on this tensor: on a GPU from Ampere on, or on a CPU by its interpreter."
    return isinstance(triton, ModuleType) and (capability_of(x.device) >= (8, 0) if x.is_cuda else INTERPRETED)


def tiles_for(
    x: Tensor,
    table: dict[str, tuple],  # compute capability (major number) -> tile; "fallback" for all others
) -> tuple:
    "The tile sizes for the GPU that holds a tensor."
    return table.get(str(capability_of(x.device)[0]), table["fallback"])


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    "Kernels start on the current GPU: make it the one that holds a tensor, where there is a choice."
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext()

# %%
#| hide
LIVE = takes_triton(torch.zeros(1))
if not LIVE:
    print("no Triton on this machine: the kernels of this page do not run")

# %% [markdown]
# The first kernel is a transpose. Cut a 7 x 6 matrix into 4 x 4 tiles: a program finds by its *program id* that it has,
# say, rows 4–7 and columns 4–7. A column and a row of indices, added, give a *block of pointers* (here: offsets into
# memory); a *mask* says which of them exist:

# %%
rows, columns = 1 * 4 + torch.arange(4), 1 * 4 + torch.arange(4)
offsets = rows[:, None] * 6 + columns[None, :]
exists = (rows[:, None] < 7) & (columns[None, :] < 6)
pd.DataFrame(torch.where(exists, offsets, -1), index=[f"row {i}" for i in rows],
             columns=[f"column {j}" for j in columns]).replace(-1, "masked")

# %%
#| export
@triton.jit
def transpose_kernel(src, dst, m, n, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    "One tile of dst (n, m) = src (m, n) transposed, or dst += the same; both sides are read and written along rows."
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)  # 49,152 x 50,304 exceeds 32 bits
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    tile = tl.load(src + rows[:, None] * n + columns[None, :], mask=(rows[:, None] < m) & (columns[None, :] < n))
    tile = tl.trans(tile)
    there = dst + columns[:, None] * m + rows[None, :]
    inside = (columns[:, None] < n) & (rows[None, :] < m)
    if ADD:
        tile = tl.load(there, mask=inside).to(tl.float32) + tile.to(tl.float32)
    tl.store(there, tile.to(dst.dtype.element_ty), mask=inside)

# %% [markdown]
# `tl.constexpr` arguments are compiled in: tile sizes must be powers of two, and each combination is a kernel of its own.
# `tl.trans` turns the tile inside the chip, so that both reading and writing go along rows. That is the point: neighbouring threads
# that read neighbours share one access to memory; down a column of bf16 numbers they need 32 for 64 bytes.

# %%
#| export
TRANSPOSE_TILES = {"9": (128, 128, 8), "fallback": (64, 128, 8)}  # block_m, block_n, warps; tuned on an H100, record 76's
ADD_TILES = {"9": (128, 128, 4), "fallback": (32, 32, 4)}  # the same, record 74's
COPIED_AS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # a copy has no need of arithmetic, nor of FP8 in Triton


def transpose_launch(
    dst_nm: Tensor,
    src_mn: Tensor,
    add: bool,
    tiles: tuple[int, int, int] | None = None,  # block_m, block_n, warps
) -> None:
    "Run `transpose_kernel`."
    m, n = src_mn.shape
    block_m, block_n, warps = tiles or tiles_for(src_mn, ADD_TILES if add else TRANSPOSE_TILES)
    if not add:
        dst_nm, src_mn = (x.view(COPIED_AS[x.itemsize]) for x in (dst_nm, src_mn))
    with on_device_of(src_mn):
        transpose_kernel[triton.cdiv(n, block_n), triton.cdiv(m, block_m)](
            src_mn, dst_nm, m, n, add, block_m, block_n, num_warps=warps)

# %%
#| export
def check_transpose(name: str, src_mn: Tensor, dst_nm: Tensor | None = None) -> None:
    "Raise a `ValueError` that says what a transpose kernel takes."
    if src_mn.ndim != 2 or not src_mn.is_contiguous() or src_mn.itemsize not in COPIED_AS:
        raise ValueError(f"{name} takes a contiguous matrix of 1-, 2- or 4-byte numbers, not {tuple(src_mn.shape)} "
                         f"{src_mn.dtype} with strides {src_mn.stride()}: call .contiguous() first")
    if dst_nm is not None and not (dst_nm.shape == src_mn.shape[::-1] and dst_nm.is_contiguous()
                                   and dst_nm.dtype == src_mn.dtype):
        raise ValueError(f"{name} needs a contiguous target of shape {tuple(src_mn.shape[::-1])} and {src_mn.dtype}, "
                         f"not {tuple(dst_nm.shape)} {dst_nm.dtype} with strides {dst_nm.stride()}")

# %% [markdown]
# A *custom operator* makes a launch one opaque call for `torch.compile`; the function beside it tells the compiler the
# result's shape. FP8 numbers travel as integers, since a copy needs no arithmetic:

# %%
#| export
@torch.library.custom_op("speedrun::transposed", mutates_args=())
def transposed(
    x_mn: Tensor,  # contiguous; 1, 2 or 4 bytes a number
) -> Tensor:  # (n, m), contiguous
    "A transposed copy, tile by tile (records 74 and 76)."
    check_transpose("transposed", x_mn)
    out_nm = x_mn.new_empty(x_mn.shape[::-1])
    copy_transposed(out_nm, x_mn)
    return out_nm


@transposed.register_fake
def transposed_shape(x_mn):
    return x_mn.new_empty(x_mn.shape[::-1])

# %%
#| export
@torch.library.custom_op("speedrun::copy_transposed", mutates_args={"dst_nm"})
def copy_transposed(
    dst_nm: Tensor,  # written
    src_mn: Tensor,
) -> None:
    "dst ← srcᵀ; for tied weights embed ← headᵀ (record 74)."
    check_transpose("copy_transposed", src_mn, dst_nm)
    if takes_triton(src_mn) and src_mn.numel():
        transpose_launch(dst_nm, src_mn, add=False)
    else:
        dst_nm.copy_(src_mn.T)


@torch.library.custom_op("speedrun::add_transposed", mutates_args={"dst_nm"})
def add_transposed(
    dst_nm: Tensor,  # floating-point numbers, updated
    src_mn: Tensor,
) -> None:
    "dst += srcᵀ, added in fp32 and rounded once; for tied weights the gradient of head and embedding (record 74)."
    check_transpose("add_transposed", src_mn, dst_nm)
    if src_mn.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"add_transposed adds bf16, fp16 or fp32 numbers, not {src_mn.dtype}")
    if takes_triton(src_mn) and src_mn.numel():
        transpose_launch(dst_nm, src_mn, add=True)
    else:
        dst_nm += src_mn.T

# %%
x8 = torch.randn(70, 150).to(torch.float8_e4m3fn)
assert torch.equal(transposed(x8).view(torch.uint8), x8.T.contiguous().view(torch.uint8)), "70 is no multiple of 64"
head_grad, embed_grad = torch.ones(3, 5), torch.arange(15.0).view(5, 3)
add_transposed(head_grad, embed_grad)
head_grad

# %% [markdown]
# **What transposes are for.** While head and embedding [are tied](24_two_speeds.ipynb), one is stored as the transpose
# of the other: at odd steps the head's gradient gets the embedding's, and afterwards embed ← headᵀ, 77 MB each. The
# [FP8 head](50_fp8_head.ipynb) copies its 8-bit gradient of the logits, 2.5 GB, because the FP8 product wants its
# second factor in columns. PyTorch's generic copy is one element-wise kernel for all layouts. Record 74 reports a second
# cost: it fills every processor, and the communication that should run beside it waits.
#
# ## The smallest code that does it
# Which tile does program p compute? Launching the full grid and returning at once above the diagonal would waste starts; a
# formula finds the p-th tile of the triangle:

# %%
#| export
@triton.jit
def lower_tile(program, tiles, GROUP: tl.constexpr):
    "Row and column of a program's tile: `GROUP` rows at a time, a rectangle by columns, then a triangle by rows."
    # row t of a triangle starts at number p = t(t+1)/2, where 8p + 1 = (2t + 1)²; 8p + 5 keeps away from these
    # squares, so that an approximate root does no harm
    row = ((tl.sqrt(8.0 * program + 5.0) - 1.0) / 2.0).to(tl.int32)
    first = row // GROUP * GROUP
    height = tl.minimum(GROUP, tiles - first)
    number = program - first * (first + 1) // 2  # in its group
    rest = tl.maximum(number - height * first, 0)
    low = ((tl.sqrt(8.0 * rest + 5.0) - 1.0) / 2.0).to(tl.int32)
    in_rectangle = number < height * first
    i = first + tl.where(in_rectangle, number % height, low)
    j = tl.where(in_rectangle, number // height, first + rest - low * (low + 1) // 2)
    return i, j

# %%
#| hide
if LIVE:

    @triton.jit
    def order_kernel(out, tiles, GROUP: tl.constexpr):
        i, j = lower_tile(tl.program_id(0), tiles, GROUP)
        tl.store(out + 2 * tl.program_id(0), i)
        tl.store(out + 2 * tl.program_id(0) + 1, j)

    for tiles, group in ((6, 8), (11, 4)):
        seen = torch.zeros(tiles * (tiles + 1) // 2, 2, dtype=torch.int32)
        order_kernel[len(seen),](seen, tiles, group)
        assert list(map(tuple, seen.tolist())) == launch_order(tiles, group), "the picture shows the kernel's own order"
assert all(len(set(launch_order(t, g))) == t * (t + 1) // 2 for t in range(1, 30) for g in (1, 3, 8))

# %% [markdown]
# The kernel. `tl.dot` multiplies two tiles on the tensor cores and adds to `acc`, in fp32. The loop walks along the
# inner dimension; while one pair of tiles is multiplied, the next ones (`num_stages`) are on their way. Strides say where the next row
# and the next inner element lie, so that Xᵀ·X is the same kernel with the two swapped.

# %%
#| export
@triton.jit
def symmetric_kernel(
    x, out, side, inner, stride_n, stride_row, stride_inner, b, c,
    QUINTIC: tl.constexpr, EVEN: tl.constexpr, FP32_DOT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    "One tile of X·Xᵀ, or of b·X + c·X·Xᵀ for symmetric X, and its mirror image."
    i, j = lower_tile(tl.program_id(0), (side + BLOCK - 1) // BLOCK, GROUP)
    matrix = tl.program_id(1).to(tl.int64)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    x += matrix * stride_n
    left = x + rows[:, None].to(tl.int64) * stride_row + k[None, :] * stride_inner
    right = x + columns[:, None].to(tl.int64) * stride_row + k[None, :] * stride_inner
    acc = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for start in range(0, inner, BLOCK_K):
        if EVEN:  # sizes are multiples of the tile
            lhs, rhs = tl.load(left), tl.load(right)
        else:
            exists = k[None, :] < inner - start
            lhs = tl.load(left, mask=(rows[:, None] < side) & exists, other=0.0)
            rhs = tl.load(right, mask=(columns[:, None] < side) & exists, other=0.0)
        if FP32_DOT:  # the interpreter would multiply the bits of bf16 as if they were integers
            lhs, rhs = lhs.to(tl.float32), rhs.to(tl.float32)
        acc = tl.dot(lhs, tl.trans(rhs), acc)
        left += BLOCK_K * stride_inner
        right += BLOCK_K * stride_inner
    inside = (rows[:, None] < side) & (columns[None, :] < side)
    if QUINTIC:
        here = x + rows[:, None].to(tl.int64) * stride_row + columns[None, :] * stride_inner
        acc = c * acc + b * tl.load(here, mask=inside, other=0.0).to(tl.float32)
    tile = acc.to(out.dtype.element_ty)  # the only rounding
    out += matrix * side * side
    tl.store(out + rows[:, None].to(tl.int64) * side + columns[None, :], tile, mask=inside)
    if i != j:
        mirror = out + columns[:, None].to(tl.int64) * side + rows[None, :]
        tl.store(mirror, tl.trans(tile), mask=(columns[:, None] < side) & (rows[None, :] < side))

# %% [markdown]
# With `QUINTIC` the end of the same kernel makes b·A + c·A·A of A·A: A is symmetric, so A·A = A·Aᵀ. Plain PyTorch rounds
# to bf16 four times on the way, the kernel once.
#
# From Hopper on, *tensor descriptors* hand whole tiles to the GPU's copy engine: no pointers, no masks, fewer registers.
# Here all matrices of the stack are one tall matrix, so this kernel takes only sizes that are multiples of the tile:

# %%
#| export
@triton.jit
def symmetric_descriptor_kernel(
    x, x_tile, out, rows_of_x, side, inner, b, c, TALL: tl.constexpr, QUINTIC: tl.constexpr, ONCE: tl.constexpr,
    FP32_DOT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    "The same for even sizes; descriptors of the stacked matrices let the GPU's copy engine move whole tiles."
    i, j = lower_tile(tl.program_id(0), side // BLOCK, GROUP)
    first, row, column = tl.program_id(1) * rows_of_x, i * BLOCK, j * BLOCK
    acc = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    once = ONCE and i == j
    if once:  # on the diagonal one strip is both factors
        for k in range(0, inner, BLOCK_K):
            if TALL:
                strip = tl.trans(x.load([first + k, row]))
            else:
                strip = x.load([first + row, k])
            if FP32_DOT:
                strip = strip.to(tl.float32)
            acc = tl.dot(strip, tl.trans(strip), acc)
    else:
        for k in range(0, inner, BLOCK_K):
            if TALL:
                lhs, rhs = tl.trans(x.load([first + k, row])), x.load([first + k, column])
            else:
                lhs, rhs = x.load([first + row, k]), tl.trans(x.load([first + column, k]))
            if FP32_DOT:
                lhs, rhs = lhs.to(tl.float32), rhs.to(tl.float32)
            acc = tl.dot(lhs, rhs, acc)
    if QUINTIC:
        acc = c * acc + b * x_tile.load([first + row, column]).to(tl.float32)
    tile = acc.to(out.dtype)
    start = tl.program_id(1) * side
    out.store([start + row, column], tile)
    if i != j:
        out.store([start + column, row], tl.trans(tile))

# %%
#| export
SYMMETRIC_TILES = {  # block, block_k, group, stages, warps, descriptors
    "9": (128, 64, 8, 3, 4, False),  # tuned on an H100
    "8": (128, 32, 8, 3, 8, False),
    "fallback": (64, 32, 8, 3, 4, False),
}


def symmetric_launch(
    x_nsk: Tensor,  # any strides; fastest when one of the last two is 1
    b: float = 0.0,
    c: float = 1.0,
    quintic: bool = False,  # b·X + c·X·Xᵀ instead of X·Xᵀ
    tiles: tuple[int, ...] | None = None,  # as in `SYMMETRIC_TILES`
) -> Tensor:  # (n, s, s)
    "Run a kernel on each matrix of a stack, in one launch."
    n, side, inner = x_nsk.shape
    block, block_k, group, stages, warps, descriptors = tiles or tiles_for(x_nsk, SYMMETRIC_TILES)
    out, even = x_nsk.new_empty(n, side, side), side % block == 0 and inner % block_k == 0
    tall = x_nsk.stride(2) != 1
    rows = x_nsk.mT if tall else x_nsk  # as they lie in memory
    across = triton.cdiv(side, block)
    grid, sizes = (across * (across + 1) // 2, n), {"num_stages": stages, "num_warps": warps}
    with on_device_of(x_nsk):
        if descriptors and even and rows.is_contiguous() and rows.data_ptr() % 16 == 0:
            from triton.tools.tensor_descriptor import TensorDescriptor

            rows, flat = rows.view(-1, rows.shape[2]), out.view(-1, side)
            x = TensorDescriptor.from_tensor(rows, [block_k, block] if tall else [block, block_k])
            tile = TensorDescriptor.from_tensor(flat, [block, block])
            x_tile = TensorDescriptor.from_tensor(rows, [block, block]) if quintic else tile  # then unused
            symmetric_descriptor_kernel[grid](
                x, x_tile, tile, len(rows) // n, side, inner, b, c, tall, quintic, descriptors == 2, INTERPRETED, block, block_k,
                group, **sizes)
        else:
            symmetric_kernel[grid](
                x_nsk, out, side, inner, *x_nsk.stride(), b, c, quintic, even, INTERPRETED, block, block_k, group, **sizes)
    return out

# %%
#| export
def suits_symmetric(x: Tensor) -> bool:
    "Whether `symmetric_kernel` takes these matrices; the plain product takes all others."
    return takes_triton(x) and x.dtype in (torch.bfloat16, torch.float16) and x.numel() > 0


@torch.library.custom_op("speedrun::symmetric_gram", mutates_args=())
def symmetric_gram(
    x_nrc: Tensor,  # a stack of matrices, any strides
) -> Tensor:  # (n, s, s), s = min(r, c)
    "X·Xᵀ of each matrix, Xᵀ·X where there are more rows than columns; half of it computed, half mirrored (record 27)."
    if x_nrc.ndim != 3:
        raise ValueError(f"symmetric_gram takes a stack of matrices (n, r, c), not {tuple(x_nrc.shape)}")
    if not suits_symmetric(x_nrc):
        return plain_gram(x_nrc)
    return symmetric_launch(x_nrc.mT if x_nrc.shape[-2] > x_nrc.shape[-1] else x_nrc)


@symmetric_gram.register_fake
def symmetric_gram_shape(x_nrc):
    side = min(x_nrc.shape[-2:])
    return x_nrc.new_empty(x_nrc.shape[0], side, side)

# %%
#| export
@torch.library.custom_op("speedrun::symmetric_quintic", mutates_args=())
def symmetric_quintic(
    gram_nss: Tensor,  # symmetric matrices; only symmetric ones give what the name says
    b: float,
    c: float,
) -> Tensor:  # (n, s, s)
    "b·A + c·A·A of each symmetric matrix, in one kernel with one rounding (record 27)."
    if gram_nss.ndim != 3 or gram_nss.shape[-2] != gram_nss.shape[-1]:
        raise ValueError(f"symmetric_quintic takes a stack of square matrices (n, s, s), not {tuple(gram_nss.shape)}")
    if not suits_symmetric(gram_nss):
        return plain_quintic(gram_nss, b, c)
    return symmetric_launch(gram_nss, b, c, quintic=True)


@symmetric_quintic.register_fake
def symmetric_quintic_shape(gram_nss, b, c):
    return gram_nss.new_empty(gram_nss.shape)

# %% [markdown]
# ## Look inside
# The kernels run here on the CPU, tile by tile, both of them, on matrices of which two fit no tile:

# %%
generator = torch.Generator().manual_seed(0)
bank = torch.randn(3, 128, 128, generator=generator).bfloat16()
found = []
for name, x in {"wide": bank[:, :40, :72], "tall": bank[:, :72, :40], "square": bank[:, :64, :64].contiguous()}.items():
    gram, exact = symmetric_gram(x), plain_gram(x.double())
    if LIVE and name == "square":
        assert torch.equal(gram, symmetric_launch(x, tiles=(32, 32, 8, 2, 4, True))), "descriptors change nothing"
    quintic, exact_quintic = symmetric_quintic(gram, -2.8, 0.5), plain_quintic(gram.double(), -2.8, 0.5)
    assert torch.equal(gram, gram.mT) and torch.equal(quintic, quintic.mT), "equal to its mirror image, to the bit"
    found.append({"stack": name, "result": tuple(gram.shape), "error": float((gram - exact).norm() / exact.norm()),
                  "error, quintic": float((quintic - exact_quintic).norm() / exact_quintic.norm())})
pd.DataFrame(found).set_index("stack").round(4)

# %%
#| hide
assert all(row["error"] < 5e-3 and row["error, quintic"] < 6e-3 for row in found)
u = bank[:2, :40, :72].float()
assert torch.equal(polar_express(u, symmetric_gram, symmetric_quintic), polar_express(u)), "fp32: the plain products"

# %% [markdown]
# One bf16 rounding is 0.0017 (the interpreter cuts instead: twice that). Would such a test notice a wrong kernel? Change
# one expression of the source at a time, fill the result with NaN before, and compare on five shapes:

# %%
FAULTS = {
    "mirror forgotten": ("if i != j:", "if i == j:"),
    "mirror not transposed": ("tl.trans(tile), mask", "tile, mask"),
    "no mask on the inner dimension": (" & exists", ""),
    "all matrices into the first result": ("out += matrix * side * side", "out += 0 * matrix"),
    "stride of the loop forgotten": ("BLOCK_K * stride_inner", "BLOCK_K"),
    "quintic without b·A": ("c * acc + b * tl.load", "c * acc + 0 * tl.load"),
}
SHAPES = {"one tile": (1, 16, 16), "two tiles a side": (1, 32, 32), "two matrices": (2, 32, 32),
          "no multiples": (1, 40, 72), "tall": (1, 64, 32)}


def kernel_with(old, new):
    "The kernel with a piece of its source replaced."
    source = inspect.getsource(symmetric_kernel.fn)
    assert old in source
    path = Path(tempfile.mkdtemp()) / "faulty.py"  # Triton reads the source from a file
    path.write_text(source.replace(old, new))
    names = {"triton": triton, "tl": tl, "lower_tile": lower_tile}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return names["symmetric_kernel"]


def right(kernel, shape):
    "Whether a kernel's gram and quintic are right, with tiles of 16 x 16 x 16."
    n, r, c = shape
    x = bank[:n, :r, :c]
    x = x.mT if r > c else x
    gram = (x.float() @ x.float().mT).bfloat16()
    programs = -(-x.shape[1] // 16) * (-(-x.shape[1] // 16) + 1) // 2
    for given, quintic in ((x, False), (gram, True)):
        out = torch.full(gram.shape, torch.nan).bfloat16()
        kernel[programs, n](given, out, x.shape[1], given.shape[2], *given.stride(), 0.5, 0.01, quintic, False, True, 16, 16, 2)
        exact = plain_quintic(gram.double(), 0.5, 0.01) if quintic else plain_gram(x.mT.double().mT)
        if not (out - exact).norm() < 0.01 * exact.norm():  # also false for NaN
            return False
    return True


caught = {name: {shape: "passes" if right(kernel_with(*fault), size) else "caught" for shape, size in SHAPES.items()}
          for name, fault in FAULTS.items()} if LIVE else {}
pd.DataFrame(caught).T

# %%
#| hide
assert abs(work.loc["all", ["symmetric", "other"]].sum() - 1.32) < 0.01 and 0.27 < work.loc["all", "computed twice"] < 0.3
if LIVE:
    assert all(right(symmetric_kernel, shape) for shape in SHAPES.values())
    assert all("caught" in row.values() for row in caught.values())
    assert list(caught["mirror forgotten"].values()) == ["passes", *4 * ["caught"]]
    assert [shape for shape in SHAPES if caught["no mask on the inner dimension"][shape] == "caught"] == ["no multiples"]

# %% [markdown]
# Each fault passes somewhere: a test needs several tiles, several matrices, odd sizes and both orientations.
#
# ## Why not twice as fast?
# Of g tiles a side, g(g+1)/2 of g² are computed: (g+1)/2g, because tiles on the diagonal are computed whole.

# %%
share = pd.DataFrame({"tiles a side": [2, 6, 8, 12, 16, 24]}, index=pd.Index([256, 768, 1024, 1536, 2048, 3072], name="n"))
g = share["tiles a side"]
share["share computed"], share["at most faster"] = (g + 1) / (2 * g), 2 * g / (g + 1)
share.round(3).T

# %% [markdown]
# Smaller tiles would come nearer to one half, but each number loaded is used once per row of the tile: a tile of half
# the side needs twice the memory traffic for the same work. And every tile is written twice, library kernels are better tuned than 40 lines
# of Triton, and the last round of programs leaves processors idle: 24 matrices of 21 tiles are 504, 3.8 rounds of 132.
# On one H100 (measured, bf16, cache cleared before each call):

# %%
speed = measured("symmetric_h100").set_index(["kernel", "shape", "version"])
ms = speed.median_ms


def full_rate(kernel, shape, version):
    "TFLOP/s as if all of the product had been computed."
    n, r, c = map(int, shape.split("x"))
    return 2e-9 * n * min(r, c) ** 2 * max(r, c) / ms[kernel, shape, version]


squares = sorted((shape for kernel, shape, version in ms.index if kernel == "gram" and version == "ours"
                  and len(set(shape.split("x")[1:])) == 1 and not shape.startswith("20x")), key=lambda s: int(s.split("x")[1]))
sides = [int(shape.split("x")[1]) for shape in squares]
fig, axes = plt.subplots(1, 2, figsize=(6.5, 3), sharey=True)
for ax, kernel, title in zip(axes, ("gram", "quintic"), ("X·Xᵀ", "b·A + c·A·A"), strict=True):
    rates = {version: np.array([full_rate(kernel, shape, version) for shape in squares]) for version in ("ours", "eager")}
    limit = rates["eager"] * [2 * (n / 128) / (n / 128 + 1) for n in sides] if kernel == "gram" else None
    for version, color, label in (("ours", OURS, "ours"), ("eager", CUBLAS, "PyTorch (cuBLAS)")):
        ax.plot(sides, rates[version], "o-", color=color, ms=4)
        ax.text(sides[-1], rates[version][-1] * 1.03, label, color=color, ha="right", va="bottom")
    if limit is not None:
        ax.plot(sides, limit, ":", color=GREY, lw=1.2)
        ax.text(sides[0], limit[0], "cuBLAS's speed,\nhalf the tiles ", color=GREY, fontsize=8, va="bottom")
    ax.set(xlabel="n of an n x n matrix", title=title, ylim=(0, None), xticks=sides)
axes[0].set_ylabel("TFLOP/s, as if all were computed");

# %%
banks = ["x".join(map(str, shape)) for shape in BANKS.values()]
table = {}
for (name, (n, r, c)), shape in zip(BANKS.items(), banks, strict=True):
    side = f"{n}x{min(r, c)}x{min(r, c)}"
    pairs = {"gram": ("gram", shape), "quintic": ("quintic", side), "Polar Express": ("polar", shape)}
    table[f"{name}, {shape}"] = {label: f"{ms[(*at, 'eager')]:.3f} → {ms[(*at, 'ours')]:.3f} ms, "
                                 f"{ms[(*at, 'eager')] / ms[(*at, 'ours')]:.2f}x" for label, at in pairs.items()}
pd.DataFrame(table).T

# %% [markdown]
# ## Play: who shares what
# Programs start in order, 132 at a time, and each reads a strip of rows and a strip of columns of X. What the programs
# of one round need together should fit into the second-level cache (50 MB on an H100). Choose size, tile, and group:

# %%
def strips(n, tile, group, inner=None):
    "Largest number of distinct strips that 132 neighbouring programs read, and their megabytes in bf16."
    order = launch_order(n // tile, group)
    rounds = [order[s : s + 132] for s in range(0, len(order), 132)]
    distinct = max(len({strip for tile_at in part for strip in tile_at}) for part in rounds)
    return distinct, distinct * tile * (inner or n) * 2e-6


def draw_order(n=3072, tile=128, group=8, ax=None):
    "Tiles of one matrix in launch order, a round of 132 in red."
    if ax is None:
        _, ax = plt.subplots(figsize=(3.3, 3.3))
    distinct, megabytes = strips(n, tile, group)
    middle = len(launch_order(n // tile, group)) // 2 // 132 * 132
    draw_grid(ax, n // tile, group, f"n {n}, tile {tile}, group {group}:\n{distinct} strips, {megabytes:.0f} MB",
              slice(middle, middle + 132), shades=6)
    return ax.figure


fig, axes = plt.subplots(1, 3, figsize=(6.5, 2.6))
for ax, knobs in zip(axes, ((3072, 128, 8), (8192, 128, 1), (8192, 128, 8)), strict=True):
    draw_order(*knobs, ax=ax)

# %%
play(draw_order, n=[3072, 8192], tile=[128, 64], group=[8, 1])

# %% [markdown]
# In red, a round from the middle. At the record's sizes all of a matrix fits, and the group of 8 hardly matters; for
# 8192 it halves what the cache must hold.
#
# ## What it costs
# No parameters, no memory. Operations for the three banks fall by (computed), and a transposed copy moves each byte twice:

# %%
saved = {name: 10e-12 * n * min(r, c) ** 2 * (max(r, c) + min(r, c)) * (1 - (t + 1) / (2 * t))
         for (name, (n, r, c)), t in zip(BANKS.items(), (6, 6, 2), strict=True)}
total = work.loc["all", ["symmetric", "other"]].sum()
f"{sum(saved.values()):.2f} of {total:.2f} x 10^12 operations a step, {sum(saved.values()) / total:.0%}"

# %%
copies = [("transposed", "768x50304", "head, bf16"), ("add_transposed", "768x50304", "gradients added, bf16"),
          ("transposed", "49152x50304", "gradient of logits, FP8")]
fig, ax = plt.subplots(figsize=(6.5, 2.4))
for place, (kernel, shape, _) in enumerate(copies):
    for shift, (version, color) in enumerate((("ours", OURS), ("compiled", COLORS["second"]), ("eager", CUBLAS))):
        rate = speed.gb_per_s[kernel, shape, version] / 1e3
        ax.barh(place + 0.26 * (shift - 1), rate, height=0.24, color=color)
        ax.text(rate + 0.03, place + 0.26 * (shift - 1), f"{rate:.2f}  {version}", va="center", fontsize=8, color=color)
copy_rate = speed.ceiling_gb_per_s.iloc[0] / 1e3
ax.axvline(copy_rate, color=GREY, ls=":", lw=1)
ax.set(yticks=range(3), yticklabels=[f"{text}\n{shape}" for _, shape, text in copies], xlim=(0, copy_rate * 1.25),
       xlabel="TB/s read and written (dotted: a plain copy); measured, one H100")
ax.invert_yaxis()

# %% [markdown]
# ## What it buys
# **Published.** Record 27: 171.74 → 169.04 s, steps unchanged, one log each; it also transposes a matrix to batch all of one
# shape. Record 69: −0.4 s with other tuning (title of the merge; the author's logs are lost). Record 74 (four logs each):
# 89.80 → 88.83 s, of which inlined code is credited with about half. Record 76 (@samacqua) used the tiled transpose in the
# FP8 head, 1.23 to 1.31 times faster by itself:

# %%
before, after = load_samples("76", "baseline:baseline"), load_samples("76")
f"record 76: {before.train_time_ms.mean() / 1e3:.2f} → {after.train_time_ms.mean() / 1e3:.2f} s, n = {len(before)} and {len(after)}"

# %% [markdown]
# ## The diff

# %%
diff = diff_rungs("bf16_weights", "symmetric")
folded("speedrun diff bf16_weights symmetric: +{} −{} lines".format(*count_diff(diff)), diff, diff=True)

# %% [markdown]
# ## Does it transfer?
# - **As a kernel, yes**: [microsoft/dion](https://github.com/microsoft/dion) offers the same triangle trick.
# - **In a run, it depends.** nanochat's log (2026-01-18) saw about 20 % in isolation and nothing measurable once Muon was
#   sharded: it pays only where the optimizer is waited for. With 8 GPUs each of them orthogonalises an eighth.
# - A relative, Gram Newton-Schulz (Dao-AILab), iterates on the small symmetric matrix alone.
#
# ## Exercises
# **1. Count programs** (easy, 5 min). How many programs compute X·Xᵀ for 5 matrices of 1000 x 4000 in tiles of 128?
#
# <details><summary>Solution</summary>
#
# ```python
# programs = 180
# ```
# 1000 needs 8 tiles a side, the last one masked; 8·9/2 = 36 for each matrix. The inner 4000 only makes loops longer.
# </details>

# %%
programs = None  # your number here
if programs is not None:
    assert programs != 5 * 8 * 32 and programs != 5 * 8 * 8, "the result is 1000 x 1000, and half of its tiles are mirrored"
    assert programs != 5 * 28, "tiles on the diagonal are computed too"
    assert programs == 180, "round 1000 / 128 up, count a triangle with its diagonal, times five"


# %% [markdown]
# **2. The way back** (medium, 15 min). Write `number_of(i, j, group)`, the program of a tile i ≥ j, the inverse of
# `lower_tile`, for a number of rows that is a multiple of `group`.
#
# <details><summary>Solution</summary>
#
# ```python
# def number_of(i, j, group):
#     first = i // group * group
#     start = first * (first + 1) // 2
#     if j < first:
#         return start + j * group + i - first
#     return start + first * group + (i - first) * (i - first + 1) // 2 + j - first
# ```
# </details>

# %%
def number_of(i, j, group):
    return None  # your code here


if number_of(0, 0, 1) is not None:
    assert [number_of(i, j, 1) for i, j in launch_order(6, 1)] == list(range(21)), "with group 1 it is i(i + 1)/2 + j"
    assert number_of(4, 0, 4) == 10, "before row 4 there are 1 + 2 + 3 + 4 tiles"
    assert [number_of(i, j, 4) for i, j in launch_order(12, 4)] == list(range(78)), "columns below the group's first row first"


# %% [markdown]
# **3. X ← X + Xᵀ** (hard, 30 min). Write a kernel that does this in place for a square fp32 matrix, with
# `grid` programs. Who may touch which tile?
#
# <details><summary>Solution</summary>
#
# ```python
# @triton.jit
# def add_own_transpose(x, n, BLOCK: tl.constexpr):
#     i, j = lower_tile(tl.program_id(0), (n + BLOCK - 1) // BLOCK, 8)
#     rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
#     here, inside = x + rows[:, None] * n + columns[None, :], (rows[:, None] < n) & (columns[None, :] < n)
#     there, mirrored = x + columns[:, None] * n + rows[None, :], (columns[:, None] < n) & (rows[None, :] < n)
#     tile = tl.load(here, mask=inside) + tl.trans(tl.load(there, mask=mirrored))
#     tl.store(here, tile, mask=inside)
#     tl.store(there, tl.trans(tile), mask=mirrored)
# ```
# One program must own a tile and its mirror image, and read both before it writes: with one program a tile, the second
# would read what the first has written. So `grid = (6,)` for three tiles a side.
# </details>

# %%
def add_own_transpose(x, n, BLOCK: tl.constexpr):
    "Your kernel; put `@triton.jit` above it."


grid = None  # (number of programs,) for n = 40 and tiles of 16
if grid is not None and LIVE:
    x = torch.arange(1600.0).view(40, 40)
    right_one = x + x.T
    add_own_transpose[grid](x, 40, BLOCK=16)
    assert not torch.equal(x.tril(), right_one.tril()) or torch.equal(x, right_one), "store the mirror image as well"
    assert torch.equal(x, x.T), "does a program read a tile that another one has already changed?"
    assert torch.equal(x, right_one), "40 is no multiple of 16: mask loads and stores"


# %% [markdown]
# ## Summary
# - X·Xᵀ and polynomials of it are symmetric: compute the lower triangle of tiles, store each tile twice.
# - The saving is (g−1)/2g of the work for g tiles a side, 42 % at 768; a kernel must also be nearly as fast as the library's.
# - A transpose that reads and writes along rows, through a tile on the chip, runs near the speed of a plain copy.
#
# Read on: [Triton's tutorials](https://triton-lang.org/main/getting-started/tutorials/); the pull requests on the card.
# Next: [fused kernels](53_fused.ipynb) for the MLP and the loss.
