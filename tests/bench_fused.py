"""Fused MLP, fused loss and the whole head against eager and compiled PyTorch and Liger-Kernel, at record 82's shapes.

`python -m tests.bench_fused --out FILE.csv`; `--tune [FILE.json]` prints the times of other tiles instead, and
`--tiles FILE.json` measures with the fastest of these.

T = 16,384, 32,768, 49,152 tokens (a part in the record's stages), d = 768, v = 50,304. Columns: tests/bench.py, and
peak_gb (memory at its highest during a call, without what was there before it).

- `linear_relu2`, `linear_relu2_gradient` ("TxDxN"): our kernel in both modes; `product`: the bare cuBLAS product
- `mlp_forward`, `mlp_forward_backward`: `ours` (FusedMLP), `eager`, `compiled` (relu2_mlp), `liger` (its ReLU squared
  between two products), `products` (the two or six cuBLAS products alone)
- `loss` ("TxV"), losses and their gradient from bf16 logits: `ours` (gradient e5m2), `ours_bf16`; `eager`, `compiled`
  (mtp_losses of softcap, and autograd); `liger` (LigerCrossEntropyLoss in bf16: one target instead of three, and a
  cap by tanh). The floor moves 2 bytes in and 1 byte out for every logit; 2 out for a bf16 gradient
- `head` ("TxDxV"): loss and gradients of x and w; `ours` (FP8, its casts uncompiled), `ours_bf16`, `eager` and
  `compiled` in bf16; `liger` (LigerFusedLinearCrossEntropyLoss in bf16: some hundred rows at a time; one target)
- error: of the gradient (`linear_relu2`: of the output; `head`: of the gradient of w) against fp64, 2,048 tokens; of
  `liger` against its own function

Liger-Kernel is measured where `pip install liger-kernel` has been run (the course does not need it).
"""

import functools
import json
import statistics
import sys
import unittest.mock
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from speedrun_lib import fused
from speedrun_lib.fp8 import GRADIENT_SCALE
from speedrun_lib.fused import (
    FusedMLP,
    fused_head_loss,
    linear_relu2,
    linear_relu2_launch,
    plain_softcapped_losses,
    softcapped_launch,
    softcapped_losses,
)
from speedrun_lib.logits import softcap
from speedrun_lib.mtp import mtp_losses
from speedrun_lib.relu2 import relu2_mlp
from speedrun_lib.symmetric import tl, triton
from tests.bench import command_line, compiled, liger, milliseconds, off, rows_of, with_gradients

TOKENS, DIM, HIDDEN, VOCAB, CHECKED = (49_152, 16_384, 32_768), 768, 3072, 50_304, 2048
BF16, E5M2 = torch.bfloat16, torch.float8_e5m2
SLOW = "eager", "liger"  # timed fewer times


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    "Normal numbers in bf16."
    return (scale * torch.randn(*shape, device="cuda")).to(BF16)


def mlp_rows(tokens: int) -> Iterator[dict]:
    "The kernel in both modes, and the MLP."
    torch.manual_seed(0)
    x, grad = random(tokens, DIM), random(tokens, DIM)
    up, down = random(HIDDEN, DIM, scale=DIM**-0.5), random(HIDDEN, DIM, scale=DIM**-0.5)
    post = linear_relu2(x, up, None)
    few_x, few_grad = x[:CHECKED], grad[:CHECKED]
    inputs = [y.double() for y in (few_x, up, down)]
    pre = inputs[0] @ inputs[1].T
    exact = with_gradients(relu2_mlp, inputs, few_grad.double())[2]
    slope = 2 * pre.relu() * (few_grad.double() @ inputs[2].T)

    def error_of(mlp):
        return lambda: off(with_gradients(mlp, (few_x, up, down), few_grad)[2], exact)

    flop, shape = 2.0 * tokens * DIM * HIDDEN, (tokens, DIM, HIDDEN)
    moved = 2.0 * tokens * (DIM + HIDDEN)
    yield from rows_of("linear_relu2", shape, {
        "ours": (lambda: linear_relu2(x, up, None), lambda: off(linear_relu2(few_x, up, None), pre.relu().square())),
        "product": (lambda: x @ up.T, None)}, flop=flop, moved=moved)
    yield from rows_of("linear_relu2_gradient", shape, {
        "ours": (lambda: linear_relu2(grad, down, post),
                 lambda: off(linear_relu2(few_grad, down, post[:CHECKED]), slope)),
        "product": (lambda: grad @ down.T, None)}, flop=flop, moved=moved + 2 * tokens * HIDDEN)
    def products():
        return x @ up.T, post @ down, grad @ down.T, post.T @ grad, post @ up, post.T @ x

    ways = {"ours": FusedMLP.apply, "eager": relu2_mlp, "compiled": compiled(relu2_mlp)}
    if activation := liger("LigerReLUSquared"):
        ways["liger"] = lambda x, up, down: activation()(x @ up.T) @ down
    yield from rows_of("mlp_forward", shape, {
        **{version: (functools.partial(way, x, up, down), None) for version, way in ways.items()},
        "products": (lambda: (x @ up.T, post @ down), None)}, flop=2 * flop)
    yield from rows_of("mlp_forward_backward", shape, {
        **{version: (functools.partial(with_gradients, way, (x, up, down), grad), error_of(way))
           for version, way in ways.items()},
        "products": (products, None)}, flop=6 * flop)


def plain_loss(z: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    "What the rung before trains with."
    return mtp_losses(softcap(z.float())[None], targets[None], weights).sum()


def tanh_loss(z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    "What Liger-Kernel's losses compute."
    return F.cross_entropy(30 * torch.tanh(z / 30), targets, reduction="sum")


def plain_head(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    "With its product."
    return plain_loss(x @ w, targets, weights)


def loss_rows(tokens: int) -> Iterator[dict]:
    "Losses and gradient from logits."
    torch.manual_seed(0)
    z, targets = random(tokens, VOCAB, scale=4.0), torch.randint(VOCAB, (tokens,), device="cuda")
    weights = torch.tensor([1.0, 0.5, 0.25], device="cuda")
    few = z[:CHECKED], targets[:CHECKED], weights
    exact = plain_softcapped_losses(few[0][:512].double(), few[1][:512], weights.double())[1][:500]

    def error_of(function):
        return lambda: off(function(*few)[:500], exact)

    def ours(dtype):
        unit = GRADIENT_SCALE if dtype == E5M2 else 1
        return (lambda: softcapped_losses(z, targets, weights, dtype),
                error_of(lambda *inputs: unit * softcapped_losses(*inputs, dtype)[1].double()),
                {"moved": (2.0 + dtype.itemsize) * tokens * VOCAB})

    def autograd(function):
        return (lambda: with_gradients(lambda z: function(z, targets, weights), (z,)),
                error_of(lambda z, *rest: with_gradients(lambda z: plain_loss(z, *rest), (z,))[1]))

    versions = {"ours": ours(E5M2), "ours_bf16": ours(BF16), "compiled": autograd(compiled(plain_loss))}
    if tokens != 32_768:  # slow
        versions["eager"] = autograd(plain_loss)
    if cross_entropy := liger("LigerCrossEntropyLoss"):
        theirs = cross_entropy(softcap=30.0, reduction="sum")
        with_one_target = with_gradients(lambda z: tanh_loss(z, few[1]), (few[0].double(),))[1]
        versions["liger"] = (  # overwrites its input: last
            lambda: with_gradients(lambda z: theirs(z, targets), (z,)),
            lambda: off(with_gradients(lambda z: theirs(z, few[1]), (few[0].clone(),))[1], with_one_target))
    yield from rows_of("loss", (tokens, VOCAB), versions, SLOW, moved=4.0 * tokens * VOCAB)


def head_rows(tokens: int) -> Iterator[dict]:
    "Loss and gradients of x and w."
    torch.manual_seed(0)
    x, w = F.rms_norm(random(tokens, DIM), (DIM,)), random(DIM, VOCAB, scale=0.05)
    targets, weights = torch.randint(VOCAB, (tokens,), device="cuda"), torch.tensor([1.0, 0.5, 0.25], device="cuda")
    few = x[:512], w
    rest = targets[:512], weights

    exact = with_gradients(lambda x, w: mtp_losses(softcap(x @ w)[None], rest[0][None], weights).sum(),
                           [y.double() for y in few])[2]

    def version(function, checked, **changed):
        return (lambda: with_gradients(lambda x, w: function(x, w, targets, weights), (x, w)),
                lambda: off(with_gradients(lambda x, w: checked(x, w, *rest), few)[2], exact), changed)

    def in_bf16(*inputs):
        with unittest.mock.patch.object(fused, "uses_fp8", lambda device: False):
            return fused_head_loss(*inputs)

    versions = {"ours": version(fused_head_loss, fused_head_loss, rate="fp8"), "ours_bf16": version(in_bf16, in_bf16),
                "compiled": version(compiled(plain_head), plain_head)}
    if tokens != 32_768:  # slow
        versions["eager"] = version(plain_head, plain_head)
    if linear_cross_entropy := liger("LigerFusedLinearCrossEntropyLoss"):
        theirs, w_rows = linear_cross_entropy(softcap=30.0, reduction="sum"), w.T.contiguous()
        double = [few[0].double(), w_rows.double()]
        with_one_target = with_gradients(lambda x, w: tanh_loss(x @ w.T, rest[0]), double)[2]
        versions["liger"] = (
            lambda: with_gradients(lambda x, w: theirs(w, x, targets), (x, w_rows)),
            lambda: off(with_gradients(lambda x, w: theirs(w, x, rest[0]), (few[0], w_rows))[2], with_one_target))
    yield from rows_of("head", (tokens, DIM, VOCAB), versions, SLOW, flop=6.0 * tokens * DIM * VOCAB)


def measure() -> list[dict]:
    "All rows."
    rows = []
    for tokens in TOKENS:
        rows += mlp_rows(tokens)
        rows += loss_rows(tokens)
        rows += head_rows(tokens)
        if "--out" in sys.argv:  # what there is, in case that time runs out
            pd.DataFrame(rows).to_csv(sys.argv[sys.argv.index("--out") + 1], index=False, float_format="%.6g")
    return rows


@triton.jit
def reread_kernel(z_ptr, target_ptr, weight_ptr, grad_ptr, rows, grad_factor,
                  V: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    "The other way to fuse the loss: a program for each row reads it twice, the second time from the L2 cache."
    HALF: tl.constexpr = 11.5 * 1.4426950408889634
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    start = row.to(tl.int64) * V
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, V, BLOCK):
        z = tl.load(z_ptr + start + i + column, mask=i + column < V, other=-1e4, eviction_policy="evict_last")
        total += tl.exp2(HALF * fused.tanh_of(z.to(tl.float32) * (1 / 15) + 1 / 3, False) - HALF)
    log_sum, weight = tl.log2(tl.sum(total) - (-V % BLOCK) * 2.0 ** (-2 * HALF)), 0.0
    for k in tl.static_range(N):
        weight += tl.load(weight_ptr + k)
    level = tl.log2(weight * grad_factor) - log_sum - HALF
    for i in range(0, V, BLOCK):
        z = tl.load(z_ptr + start + i + column, mask=i + column < V, other=-1e4, eviction_policy="evict_first")
        t = fused.tanh_of(z.to(tl.float32) * (1 / 15) + 1 / 3, False)
        grad = (1 - t * t) * tl.exp2(HALF * t + level)
        for k in tl.static_range(N):
            target = tl.load(target_ptr + row + k, mask=row + k < rows, other=-1)
            if target // BLOCK == i // BLOCK:
                grad -= tl.where(i + column == target, tl.load(weight_ptr + k) * grad_factor * (1 - t * t), 0.0)
        tl.store(grad_ptr + start + i + column, grad.to(grad_ptr.dtype.element_ty), mask=i + column < V)


def reread(z: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, block: int, warps: int) -> torch.Tensor:
    "The gradient by `reread_kernel`; it leaves out the losses."
    grad = torch.empty_like(z, dtype=E5M2)
    factor = 11.5 / 15 / GRADIENT_SCALE
    reread_kernel[len(z),](z, targets, weights, grad, len(z), factor, z.shape[1], len(weights), block, num_warps=warps)
    return grad


def tune(file: Path | None) -> None:
    "Times of other tiles in milliseconds, fastest first; also into a file."
    torch.manual_seed(0)
    tokens = TOKENS[0]
    x, grad = random(tokens, DIM), random(tokens, DIM)
    up, down = random(HIDDEN, DIM, scale=DIM**-0.5), random(HIDDEN, DIM, scale=DIM**-0.5)
    post = linear_relu2(x, up, None)
    z, targets = random(tokens, VOCAB, scale=4.0), torch.randint(VOCAB, (tokens,), device="cuda")
    weights = torch.tensor([1.0, 0.5, 0.25], device="cuda")
    forward, backward = [(128, 256, 64, 4, 8), (128, 256, 64, 3, 8)], [(128, 256, 64, 3, 8), (256, 128, 64, 3, 8)]
    loss = [(4096, 16, 3), (2048, 16, 3), (4096, 16, 1)]
    tries = {
        "linear_relu2": {t: functools.partial(linear_relu2_launch, x, up, None, t) for t in forward},
        "linear_relu2_gradient": {t: functools.partial(linear_relu2_launch, grad, down, post, t) for t in backward},
        "product": {"cublas": lambda: x @ up.T},
        "loss": {t: functools.partial(softcapped_launch, z, targets, weights, E5M2, t) for t in loss},
        "loss_reread": {t: functools.partial(reread, z, targets, weights, *t) for t in ((4096, 8),)},
    }
    found = {}
    for kernel, functions in tries.items():
        times = {}
        for tiles, function in functions.items():
            try:
                times[json.dumps(tiles)] = round(statistics.median(milliseconds(function, runs=10)), 4)
            except Exception as problem:
                times[json.dumps(tiles)] = f"{type(problem).__name__}: {problem}".split("\n")[0][:120]
        found[kernel] = dict(sorted(times.items(), key=lambda item: (isinstance(item[1], str), item[1])))
        print(json.dumps({kernel: found[kernel]}), flush=True)
        if file:
            file.write_text(json.dumps(found))


def take_tiles(file: Path) -> None:
    "Use the fastest tiles that `--tune` found."
    found = json.loads(file.read_text())
    for kernel, table in (("linear_relu2", fused.MLP_TILES), ("linear_relu2_gradient", fused.MLP_GRADIENT_TILES),
                          ("loss", fused.LOSS_TILES)):
        if kernel in found:
            table[str(torch.cuda.get_device_capability()[0])] = tuple(json.loads(next(iter(found[kernel]))))
            print(kernel, table, flush=True)


if __name__ == "__main__":
    if "--tune" in sys.argv:
        tune(Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    else:
        if "--tiles" in sys.argv:
            at = sys.argv.index("--tiles")
            _, tiles_file = sys.argv.pop(at), sys.argv.pop(at)
            take_tiles(Path(tiles_file))
        command_line(__doc__, measure)
