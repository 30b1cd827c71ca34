"""Time and error of the head's three products in bf16 and FP8 at the shapes of record 82, and of the whole head.

`python -m tests.bench_fp8 --out FILE.csv`; needs a GPU of compute capability 8.9 or more. Columns: tests/bench.py.

Shapes are "TxDxV" with T = 16,384, 32,768, 49,152 tokens (a part in the record's stages), D = 768, V = 50,304.

- kernels `logits`, `grad_x`, `grad_w`, in the versions `bf16` (cuBLAS), `fp8` and `fp8_fast` (the product alone,
  without and with fast accumulation), `fp8_compiled` (with all that it needs: quantising, and copies transposed by the
  compiler's own kernel; grad_x and grad_w each quantise the gradient here, the whole head does so once)
- kernel `transpose`: the plain copy of the e5m2 gradient, eager, (T, V) -> (V, T)
- kernel `head`: logits and both gradients from x, w and a bf16 gradient of the logits; `bf16` and `fp8`, eager and
  compiled; `fp8_turned`: compiled, transposed by the kernel of chapter 52; `fp8_gradient_ready` and
  `fp8_turned_gradient_ready`: the gradient arrives in e5m2 as from the fused loss (records 67 and 75)
- kernel `e4m3 of 500`, eager and compiled: the note is what the number becomes; no time
- error: ||out - exact|| / ||exact|| against fp64 on the same bf16 inputs, with 2,048 tokens (for `head`: of the
  gradient of w). Inputs: normed normal x, w of standard deviation 0.05, the gradient of a softcapped cross-entropy
- floor_ms of FP8 rows counts the operations at the FP8 ceiling of tests/bench.py, and the bytes that have to move
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from speedrun_lib.fp8 import (
    ACTIVATION_SCALE,
    GRADIENT_SCALE,
    WEIGHT_SCALE,
    fp8_gradients,
    fp8_head,
    fp8_matmul,
    plain_transpose,
    quantise,
)
from speedrun_lib.logits import softcap
from speedrun_lib.symmetric import transposed
from tests.bench import command_line, row

TOKENS, DIM, VOCAB, CHECKED = (16_384, 32_768, 49_152), 768, 50_304, 2048
E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16


def random_head(tokens: int) -> tuple[torch.Tensor, ...]:
    "Normed x, a head, and the gradient that a softcapped cross-entropy sends to the logits."
    generator = torch.Generator("cuda").manual_seed(tokens)
    random = functools.partial(torch.randn, generator=generator, device="cuda")
    x, w = F.rms_norm(random(tokens, DIM), (DIM,)).to(BF16), (0.05 * random(DIM, VOCAB)).to(BF16)
    grad = torch.empty(tokens, VOCAB, dtype=BF16, device="cuda")
    for part in torch.arange(tokens, device="cuda").split(2048):
        z = (x[part] @ w).float().requires_grad_()
        targets = torch.randint(VOCAB, (len(part),), generator=generator, device="cuda")
        F.cross_entropy(softcap(z), targets, reduction="sum").backward()
        grad[part] = z.grad.to(BF16)
    return x, w, grad


def fp8_logits(x, w):
    "The forward product with all that it needs."
    scale = torch.full((), ACTIVATION_SCALE * WEIGHT_SCALE, device=x.device)
    x8, w8 = quantise(x, ACTIVATION_SCALE, E4M3), quantise(w, WEIGHT_SCALE, E4M3)
    return fp8_matmul(x8, plain_transpose(w8).T, scale, True, BF16)


def fp8_grad_x(grad, w8):
    "The gradient of x with all that it needs."
    scale = torch.full((), GRADIENT_SCALE * WEIGHT_SCALE, device=grad.device)
    return fp8_matmul(quantise(grad, GRADIENT_SCALE, E5M2), w8.T, scale, False, BF16)


def fp8_grad_w(x8, grad):
    "The gradient of w with all that it needs."
    scale = torch.full((), GRADIENT_SCALE * ACTIVATION_SCALE, device=grad.device)
    grad8 = quantise(grad, GRADIENT_SCALE, E5M2)
    return fp8_matmul(plain_transpose(x8), plain_transpose(grad8).T, scale, False, torch.float32)


def bf16_head(x, w, grad):
    "Logits and both gradients in bf16."
    return x @ w, grad @ w.T, x.T @ grad


def fp8_both(x, w, grad):
    "Logits and both gradients in FP8."
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    z = fp8_head(x, w)
    return z, *torch.autograd.grad(z, (x, w), grad)


def fp8_products(x, w, grad, transpose):
    "The same in steps, with a choice of transposes; a gradient in eight bits is taken as it is."
    x8, w8 = quantise(x, ACTIVATION_SCALE, E4M3), quantise(w, WEIGHT_SCALE, E4M3)
    scale = torch.full((), ACTIVATION_SCALE * WEIGHT_SCALE, device=x.device)
    z = fp8_matmul(x8, transpose(w8).T, scale, True, BF16)
    grad8 = grad if grad.dtype == E5M2 else quantise(grad, GRADIENT_SCALE, E5M2)
    grad_scale = torch.full((), GRADIENT_SCALE, device=x.device)
    return z, *fp8_gradients(grad8, x8, w8, grad_scale, BF16, BF16, transpose)


def overflow() -> list[dict]:
    "What a number beyond the largest code becomes."
    def cast(x):
        return quantise(x, 1.0, E4M3).float()

    rows, x = [], torch.full((16,), 500.0, device="cuda")
    for version, function in (("eager", cast), ("compiled", torch.compile(cast, fullgraph=True))):
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        about |= {"kernel": "e4m3 of 500", "shape": "16", "version": version}
        rows.append(about | {"note": str(function(x)[0].item())})
    return rows


def versions(x, w, grad) -> tuple[dict[str, dict[str, tuple]], Callable]:
    "kernel -> version -> function and ceiling; and the plain transposed copy."
    x8, w8 = quantise(x, ACTIVATION_SCALE, E4M3), quantise(w, WEIGHT_SCALE, E4M3)
    grad8 = quantise(grad, GRADIENT_SCALE, E5M2)
    w8_column, xt8, gradt8 = plain_transpose(w8).T, plain_transpose(x8), plain_transpose(grad8)
    scale_z, scale_x, scale_w = (torch.full((), s, device="cuda") for s in (
        ACTIVATION_SCALE * WEIGHT_SCALE, GRADIENT_SCALE * WEIGHT_SCALE, GRADIENT_SCALE * ACTIVATION_SCALE))
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    logits8, grad_x8, grad_w8 = compiled(fp8_logits), compiled(fp8_grad_x), compiled(fp8_grad_w)
    head16, head8, products8 = compiled(bf16_head), compiled(fp8_head), compiled(fp8_products)

    def head8_both():
        leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
        z = head8(*leaves)
        return z, *torch.autograd.grad(z, leaves, grad)

    return {
        "logits": {"bf16": (lambda: x @ w, "bf16"),
                   "fp8": (lambda: fp8_matmul(x8, w8_column, scale_z, False, BF16), "fp8"),
                   "fp8_fast": (lambda: fp8_matmul(x8, w8_column, scale_z, True, BF16), "fp8"),
                   "fp8_compiled": (lambda: logits8(x, w), "fp8")},
        "grad_x": {"bf16": (lambda: grad @ w.T, "bf16"),
                   "fp8": (lambda: fp8_matmul(grad8, w8.T, scale_x, False, BF16), "fp8"),
                   "fp8_fast": (lambda: fp8_matmul(grad8, w8.T, scale_x, True, BF16), "fp8"),
                   "fp8_compiled": (lambda: grad_x8(grad, w8), "fp8")},
        "grad_w": {"bf16": (lambda: x.T @ grad, "bf16"),
                   "fp8": (lambda: fp8_matmul(xt8, gradt8.T, scale_w, False, torch.float32), "fp8"),
                   "fp8_fast": (lambda: fp8_matmul(xt8, gradt8.T, scale_w, True, torch.float32), "fp8"),
                   "fp8_compiled": (lambda: grad_w8(x8, grad), "fp8")},
        "head": {"bf16": (lambda: bf16_head(x, w, grad), "bf16"),
                 "bf16_compiled": (lambda: head16(x, w, grad), "bf16"),
                 "fp8": (lambda: fp8_both(x, w, grad), "fp8"),
                 "fp8_compiled": (head8_both, "fp8"),
                 "fp8_turned": (lambda: products8(x, w, grad, transposed), "fp8"),
                 "fp8_gradient_ready": (lambda: products8(x, w, grad8, plain_transpose), "fp8"),
                 "fp8_turned_gradient_ready": (lambda: products8(x, w, grad8, transposed), "fp8")},
    }, lambda: plain_transpose(grad8)


def exact(x, w, grad) -> dict[str, torch.Tensor]:
    "The products in fp64."
    x, w, grad = x.double(), w.double(), grad.double()
    return {"logits": x @ w, "grad_x": grad @ w.T, "grad_w": x.T @ grad}


def errors() -> dict[tuple[str, str], float]:
    "Relative error of every version on a few tokens."
    inputs = random_head(CHECKED)
    right, found = exact(*inputs), {}
    right["head"] = right["grad_w"]
    kernels, _ = versions(*inputs)
    for kernel, ways in kernels.items():
        for version, (function, _) in ways.items():
            out = function()
            out = out[2] if kernel == "head" else out
            difference = out.detach().double() - right[kernel]
            found[kernel, version] = float(difference.norm() / right[kernel].norm())
    return found


def measure() -> list[dict]:
    "All rows."
    wrong, rows = errors(), overflow()
    torch.cuda.empty_cache()
    for tokens in TOKENS:
        inputs = x, w, grad = random_head(tokens)
        kernels, transpose = versions(*inputs)
        shape, flop = f"{tokens}x{DIM}x{VOCAB}", 2.0 * tokens * DIM * VOCAB
        sizes = {"x": tokens * DIM, "w": DIM * VOCAB, "z": tokens * VOCAB}
        rows.append(row("transpose", shape, "eager", transpose, moved=2 * sizes["z"]))
        for kernel, ways in kernels.items():
            for version, (function, rate) in ways.items():
                # inputs in the precision they arrive in, outputs in bf16 (grad_w of FP8 in fp32)
                arrives = 1 if version in ("fp8", "fp8_fast") and kernel != "head" else 2
                out = {"logits": "z", "grad_x": "x", "grad_w": "w"}.get(kernel)
                if out:
                    moved = arrives * (sum(sizes.values()) - sizes[out]) + 2 * sizes[out]
                else:
                    moved = 2 * (sum(sizes.values()) * 2) - (sizes["z"] if "ready" in version else 0)
                rows.append(row(kernel, shape, version, function, (3 if kernel == "head" else 1) * flop, moved, rate,
                                wrong[kernel, version]))
        torch._dynamo.reset()
        del inputs, x, w, grad, kernels, transpose
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    command_line(__doc__, measure)
