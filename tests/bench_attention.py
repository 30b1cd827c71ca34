"""Time of every attention backend of this machine's GPU at the shapes of record 82, and how exact it is.

`python -m tests.bench_attention --out FILE.csv [--backends fa2,fa4] [--runs 20]`; needs torch, numpy and pandas.
One row for each backend, length of a part, window, and kind of call:

- device, torch, backend
- tokens, heads, head_dim, documents (of at least one token), slots (with documents of length zero), longest, window
- call: `forward`, or `forward_backward` (the gradients of q, k and v as well)
- runs, median_ms, min_ms, max_ms: as in tests/bench.py
- tflop: 4 x heads x head_dim for every pair of tokens that see each other, and 10 more for the gradients, as 10^12;
  tflop_per_s at the median; floor_ms: the same work at 650 TFLOP/s, what an H100 reaches in matrix products
- error_out, error_q, error_k, error_v: norm of the difference to attention in float64 on the same bf16 numbers, over
  the norm of the latter, on 4,096 tokens of other documents; the last three are gradients
- note: why the numbers are missing

Documents have FineWeb's median and mean (log-normal; 403 and 690 tokens, at least 32) and are cut as in the stages of
the record. Queries, keys and values are bf16, queries and keys of length sqrt(head_dim); the softmax scale is 0.1 as in
the record's first stage. `reference` waits for the CPU at each document.
"""

import argparse
import os
import statistics

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from speedrun_lib.documents import (
    ATTENTION,
    attention_backend,
    available_attention,
    choose_attention,
    cumulative_lengths,
    document_slots,
    each_document,
    reference_backward,
    reference_forward,
    varlen_attention,
)
from tests.bench import milliseconds

HEADS, HEAD_DIM, SCALE = 6, 128, 0.1
# tokens of a part, longest document, short and long window
STAGES = ((16_384, 896, (128, 384)), (32_768, 2048, (384, 896)), (49_152, 2048, (640, 1408)))
FLOOR_FLOPS = 650e12


def borders_of(tokens: int, longest: int, seed: int = 0) -> torch.Tensor:
    "Cumulative lengths of random documents that fill a part."
    lengths = np.random.default_rng(seed).lognormal(np.log(403), np.sqrt(2 * np.log(690 / 403)), tokens // 32)
    starts = np.cumsum(np.clip(lengths.round().astype(int), 32, longest))
    starts = torch.from_numpy(starts[starts < tokens])
    return cumulative_lengths(starts, tokens, max(document_slots(tokens), len(starts) + 2))


def flop(borders: torch.Tensor, window: int) -> tuple[float, float]:
    "Operations of a forward, and of a forward and backward."
    lengths = [part.stop - part.start for part in each_document(borders)]
    pairs = sum(int(np.minimum(np.arange(length), window).sum()) + length for length in lengths)
    return 4.0 * HEADS * HEAD_DIM * pairs, 14.0 * HEADS * HEAD_DIM * pairs


def random_inputs(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    "Queries, keys, values and a gradient."
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v, grad = (torch.randn(tokens, HEADS, HEAD_DIM, generator=generator, device="cuda") for _ in range(4))
    q, k = F.rms_norm(q, (HEAD_DIM,)), F.rms_norm(k, (HEAD_DIM,))
    return [x.bfloat16() for x in (q, k, v, grad)]


def run_time(borders: torch.Tensor, longest: int, window: int) -> tuple[torch.Tensor, ...]:
    "The arguments of attention beside its inputs; all but the borders stay on the CPU."
    return borders, *(torch.tensor(n, dtype=torch.int32) for n in (longest, window)), torch.tensor(SCALE)


def call(inputs: list[torch.Tensor], scalars: tuple[torch.Tensor, ...], backward: bool) -> list[torch.Tensor]:
    "The output, and on request the gradients."
    q, k, v, grad = inputs
    q, k, v = (x.detach().requires_grad_(backward) for x in (q, k, v))
    out = varlen_attention(q, k, v, *scalars)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)] if backward else [out]


def errors(longest: int, window: int, tokens: int = 4096) -> dict[str, float]:
    "Relative errors of output and gradients."
    borders, inputs = borders_of(tokens, longest, seed=1).cuda(), random_inputs(tokens, seed=1)
    scalars = run_time(borders, longest, window)
    found = call(inputs, scalars, backward=True)
    q, k, v, grad = (x.double() for x in inputs)
    scale = float(scalars[-1])
    out, lse = reference_forward(q, k, v, borders, longest, window, scale)
    right = [out, *reference_backward(grad, q, k, v, out, lse, borders, longest, window, scale)]
    return {f"error_{name}": ((a.double() - b).norm() / b.norm()).item()
            for name, a, b in zip(("out", "q", "k", "v"), found, right, strict=True)}


def measure(backend: str, runs: int) -> list[dict]:
    "Rows of one backend."
    os.environ["SPEEDRUN_ATTENTION"] = backend
    attention_backend.cache_clear()
    rows = []
    for tokens, longest, windows in STAGES:
        borders, inputs = borders_of(tokens, longest), random_inputs(tokens)
        for window in windows:
            about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "backend": backend,
                     "tokens": tokens, "heads": HEADS, "head_dim": HEAD_DIM,
                     "documents": sum(1 for _ in each_document(borders)), "slots": len(borders) - 1,
                     "longest": longest, "window": window}
            scalars = run_time(borders.cuda(), longest, window)
            try:
                wrong = errors(longest, window)
                for name, work in zip(("forward", "forward_backward"), flop(borders, window), strict=True):
                    ms = milliseconds(lambda: call(inputs, scalars, name == "forward_backward"), runs)  # noqa: B023
                    middle = statistics.median(ms)
                    rows.append(about | {
                        "call": name, "runs": runs, "median_ms": middle, "min_ms": min(ms), "max_ms": max(ms),
                        "tflop": work / 1e12, "tflop_per_s": work / 1e9 / middle, "floor_ms": 1e3 * work / FLOOR_FLOPS,
                        **wrong, "note": ""})
            except Exception as error:  # a backend that breaks is a result too
                rows.append(about | {"call": "", "note": f"{type(error).__name__}: {error}".split("\n")[0][:200]})
            print(*(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="CSV file to write")
    parser.add_argument("--backends", help="comma-separated; default: all that this machine can run")
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "error: this needs a GPU, and torch sees none\n")
    capability, available = torch.cuda.get_device_capability(), available_attention(torch.bfloat16)
    usable = [name for name, low, high, _ in ATTENTION if low <= capability < high and name in available]
    names = args.backends.split(",") if args.backends else usable
    for name in names:
        choose_attention(capability, available, name)  # says what is wrong with a name
    rows = []
    for name in names:
        rows += measure(name, max(20, args.runs))
        pd.DataFrame(rows).to_csv(args.out, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
