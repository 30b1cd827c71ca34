"""What the kernel benchmarks share: times, the machine's ceilings, rows of a CSV file. Needs a GPU."""

import argparse
import functools
import importlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
import triton


def milliseconds(function: Callable, runs: int = 30) -> list[float]:
    "Times of single calls, by CUDA events, with the L2 cache overwritten before each; the host runs ahead meanwhile."
    scratch = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    for _ in range(5):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        torch.cuda._sleep(5_000_000)  # about 3 ms: kernels then follow each other without waiting for their launches
        scratch.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


@functools.cache
def ceilings() -> dict[str, float]:
    "What this GPU reaches: bf16 and FP8 products in TFLOP/s, copying in GB/s (read and written bytes together)."
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = {"bf16_tflop_per_s": 2e-9 * n**3 / statistics.median(milliseconds(lambda: a @ b))}
    if torch.cuda.get_device_capability() >= (8, 9):
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T, torch.ones((), device="cuda")
        product = functools.partial(torch._scaled_mm, a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        found["fp8_tflop_per_s"] = 2e-9 * n**3 / statistics.median(milliseconds(product))
    x = torch.randn(2**29, device="cuda")
    y = torch.empty_like(x)
    found["gb_per_s"] = 2e-6 * x.nbytes / statistics.median(milliseconds(lambda: y.copy_(x)))
    return found


def row(
    kernel: str,  # what is computed
    shape: str,  # e.g. "24x3072x768"
    version: str,  # ours, eager, compiled, liger, cublas, ...
    function: Callable,  # one call
    flop: float = 0.0,  # operations that the mathematics needs
    moved: float = 0.0,  # bytes that have to be read and written at least
    rate: str = "bf16",  # ceiling of the operations: bf16 or fp8
    error: float = float("nan"),  # ||out - exact|| / ||exact||
    runs: int = 30,  # timed calls
) -> dict:
    "Measure one version of a kernel; the floor is what the larger of its two needs takes at this machine's ceilings."
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
             "kernel": kernel, "shape": shape, "version": version}
    try:
        times = milliseconds(function, runs)
    except Exception as problem:  # a version that breaks is a result too
        return about | {"note": f"{type(problem).__name__}: {problem}".split("\n")[0][:200]}
    ms = statistics.median(times)
    floor = max(1e-9 * flop / ceilings()[f"{rate}_tflop_per_s"], 1e-6 * moved / ceilings()["gb_per_s"])
    return about | {
        "runs": len(times), "median_ms": ms, "min_ms": min(times), "max_ms": max(times),
        "tflop_per_s": 1e-9 * flop / ms, "gb_per_s": 1e-6 * moved / ms, "floor_ms": floor, "share": floor / ms,
        "error": error, **{f"ceiling_{name}": value for name, value in ceilings().items()}, "note": ""}


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    "Norm of the difference over the norm."
    return float((found.double() - exact).norm() / exact.norm())


def compiled(function: Callable) -> Callable:
    "Compiled anew for each shape, which is when the compiler's kernels are fastest."
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def with_gradients(function: Callable, inputs: tuple, grad=None) -> list[torch.Tensor]:
    "Outputs of a function and gradients of its inputs; `grad` is what arrives for each output."
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    found = torch.autograd.grad(out, inputs, grad)
    return [*(x.detach() for x in (out if isinstance(out, tuple) else (out,))), *found]


def liger(name: str) -> Callable | None:
    "A class or function of Liger-Kernel, if it is installed."
    try:
        return getattr(importlib.import_module("liger_kernel.transformers"), name)
    except ImportError:
        return None


def peak_gb(function: Callable) -> float:
    "Memory that one call needs at most."
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return 1e-9 * (torch.cuda.max_memory_allocated() - before)


def rows_of(kernel: str, shape: tuple[int, ...], versions: dict[str, tuple], slow: tuple[str, ...] = (),
            **needs) -> Iterator[dict]:
    "A row for each version: a function to time, perhaps one that returns its error, perhaps other `needs` (see `row`)."
    for version, (function, wrong, *changed) in versions.items():
        error = peak = float("nan")
        try:
            error = wrong() if wrong else error
            peak = peak_gb(function)
        except Exception as problem:  # `row` meets it again and writes it down
            print(kernel, shape, version, problem, flush=True)
        needs_now = needs | (changed[0] if changed else {})
        found = row(kernel, "x".join(map(str, shape)), version, function, error=error,
                    runs=10 if version in slow else 30, **needs_now)
        found["peak_gb"] = peak
        print(kernel, shape, version, found.get("median_ms"), found.get("share"), found["note"], flush=True)
        yield found
        torch.cuda.empty_cache()


def command_line(description: str, measure: Callable[[], list[dict]]) -> None:
    "`--out FILE.csv`; every row is printed and written as soon as all are there."
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="CSV file to write")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "error: this needs a GPU, and torch sees none\n")
    table = pd.DataFrame(measure())
    table.to_csv(args.out, index=False, float_format="%.6g")
    shown = ["kernel", "shape", "version", "median_ms", "floor_ms", "share", "tflop_per_s", "gb_per_s", "error", "note"]
    print(table[[c for c in shown if c in table]].to_string(index=False, float_format="%.4g"), flush=True)
