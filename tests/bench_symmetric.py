"""Symmetric products and transposes against cuBLAS, eager PyTorch and torch.compile, at the shapes of record 82.

`python -m tests.bench_symmetric --out FILE.csv`; `--tune` prints the fastest tiles for each shape as JSON instead.

Kernels: `gram` (X·Xᵀ or Xᵀ·X), `quintic` (b·A + c·A·A), `polar` (all of Polar Express, five iterations),
`transposed`, `copy_transposed`, `add_transposed`. Versions: `ours`; `eager` (products by cuBLAS); `compiled`
(torch.compile of eager); `ours, compiled` (Polar Express compiled around our kernels); `pointers` and `descriptors`:
our two kernels with good tiles, whichever of them is `ours`. Operations are those that the mathematics needs, a
triangle of each symmetric product: a full product at the same TFLOP/s takes twice the time. Errors are against float64.
"""

import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator

import torch

from speedrun_lib.polar import POLAR_COEFFICIENTS, plain_gram, plain_quintic, polar_express
from speedrun_lib.symmetric import (
    add_transposed,
    copy_transposed,
    symmetric_gram,
    symmetric_launch,
    symmetric_quintic,
    transpose_launch,
    transposed,
)
from tests.bench import command_line, compiled, milliseconds, off, row

BANKS = ((24, 3072, 768), (20, 768, 768), (60, 256, 768))
SQUARES = tuple((max(1, 24 * 768**2 // n**2), n, n) for n in (768, 1024, 1536, 2048, 3072))
HEAD, LOGITS = (768, 50_304), (49_152, 50_304)
B, C = POLAR_COEFFICIENTS[2][1:]


def name(shape: tuple[int, ...]) -> str:
    "E.g. 24x3072x768."
    return "x".join(map(str, shape))


def stack(shape: tuple[int, int, int]) -> torch.Tensor:
    "Random matrices whose largest singular values are near one."
    generator = torch.Generator("cuda").manual_seed(0)
    return (torch.randn(shape, generator=generator, device="cuda") / 2 / max(shape[1:]) ** 0.5).bfloat16()


def with_tiles(*tiles: int) -> tuple[Callable, Callable]:
    "Both products with tiles of one's choice."
    def gram_of(x):
        return symmetric_launch(x.mT if x.shape[-2] > x.shape[-1] else x, tiles=tiles)

    def quintic_of(gram, b, c):
        return symmetric_launch(gram, b, c, True, tiles)

    return gram_of, quintic_of


POINTERS, DESCRIPTORS = with_tiles(128, 64, 8, 3, 4, False), with_tiles(128, 64, 8, 3, 4, True)


def polar_ours(u: torch.Tensor) -> torch.Tensor:
    "Polar Express with the kernels."
    return polar_express(u, symmetric_gram, symmetric_quintic)


def polar_exact(u: torch.Tensor) -> torch.Tensor:
    "The same mathematics in float64."
    x = u.double()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_COEFFICIENTS:
        poly = plain_quintic(plain_gram(x), b, c)
        x = a * x + (x @ poly if x.shape[-2] > x.shape[-1] else poly @ x)
    return x


def rows_of(kernel: str, shape: tuple, versions: dict[str, Callable], inputs: tuple, exact: torch.Tensor | None,
            flop: float = 0.0, moved: float = 0.0) -> Iterator[dict]:
    "A row for each version."
    for version, function in versions.items():
        wrong = float("nan")
        if exact is not None:
            try:
                wrong = off(function(*inputs), exact)
            except Exception as problem:  # `row` writes down why
                print(kernel, name(shape), version, problem, flush=True)
        yield row(kernel, name(shape), version, lambda: function(*inputs), flop, moved, error=wrong)  # noqa: B023


def products(shape: tuple[int, int, int], compile_too: bool) -> Iterator[dict]:
    "The two symmetric products."
    (n, r, c), x = shape, stack(shape)
    s, k = min(r, c), max(r, c)
    versions = {"ours": symmetric_gram, "pointers": POINTERS[0], "descriptors": DESCRIPTORS[0], "eager": plain_gram}
    if compile_too:
        versions["compiled"] = compiled(plain_gram)
    yield from rows_of("gram", shape, versions, (x,), plain_gram(x.double()), n * s * (s + 1) * k,
                       2 * n * (r * c + s * s))
    gram = symmetric_gram(x)
    versions = {"ours": symmetric_quintic, "pointers": POINTERS[1], "descriptors": DESCRIPTORS[1],
                "eager": plain_quintic}
    if compile_too:
        versions["compiled"] = compiled(plain_quintic)
    yield from rows_of("quintic", (n, s, s), versions, (gram, B, C), plain_quintic(gram.double(), B, C),
                       n * s * (s + 1) * s, 4 * n * s * s)


def measure() -> list[dict]:
    "All rows."
    rows = []
    for shape in BANKS:
        rows += products(shape, compile_too=True)
    for shape in SQUARES:
        rows += products(shape, compile_too=False)
    for shape in BANKS:
        (n, r, c), u = shape, stack(shape)
        s, k = min(r, c), max(r, c)
        flop = 5 * n * (s * (s + 1) * k + s * (s + 1) * s + 2 * s * s * k)
        versions = {"ours": polar_ours, "ours, compiled": compiled(polar_ours), "eager": polar_express,
                    "compiled": compiled(polar_express), "pointers": lambda u: polar_express(u, *POINTERS),
                    "descriptors": lambda u: polar_express(u, *DESCRIPTORS)}
        rows += rows_of("polar", shape, versions, (u,), polar_exact(u), flop, 4 * n * r * c)
    head = torch.randn(HEAD, device="cuda").bfloat16()
    embed = torch.randn(HEAD[::-1], device="cuda").bfloat16()
    bytes_moved = 2 * head.nbytes
    rows += rows_of("transposed", HEAD, {
        "ours": transposed, "eager": lambda x: x.T.contiguous(), "compiled": compiled(lambda x: x.T.contiguous()),
    }, (head,), head.T.double(), moved=bytes_moved)
    rows += rows_of("copy_transposed", HEAD, {
        "ours": copy_transposed, "eager": lambda dst, src: dst.copy_(src.T),
        "compiled": compiled(lambda dst, src: dst.copy_(src.T)),
    }, (embed.clone(), head), None, moved=bytes_moved)
    rows += rows_of("add_transposed", HEAD, {
        "ours": add_transposed, "eager": lambda dst, src: dst.add_(src.T),
        "compiled": compiled(lambda dst, src: dst.add_(src.T)),
    }, (embed.clone(), head), None, moved=1.5 * bytes_moved)
    logits = torch.randint(0, 120, LOGITS, dtype=torch.uint8, device="cuda").view(torch.float8_e5m2)
    rows += rows_of("transposed", LOGITS, {
        "ours": transposed, "eager": lambda x: x.T.contiguous(), "compiled": compiled(lambda x: x.T.contiguous()),
    }, (logits,), None, moved=2 * logits.nbytes)
    return list({(r["kernel"], r["shape"], r["version"]): r for r in rows}.values())  # 24x768x768 comes twice


TRIED = [  # block, block_k, group, stages, warps, descriptors
    *((128, 64, 8, stages, warps, kind) for stages, warps in ((3, 4), (3, 8), (4, 8)) for kind in (False, True)),
    *((128, block_k, 8, stages, 8, True) for block_k, stages in ((32, 5), (32, 6), (128, 3))),
    (128, 32, 8, 4, 8, False), (64, 64, 8, 4, 4, True),
]
TRIED_TRANSPOSES = [(*blocks, warps) for blocks in ((32, 32), (64, 128), (128, 64), (128, 128))
                    for warps in (4, 8)]


def best(options: list[tuple], run: Callable) -> list[tuple]:
    "The three fastest options with their milliseconds."
    times = []
    for option in options:
        try:
            times.append((round(statistics.median(milliseconds(lambda: run(option), runs=10)), 4), option))  # noqa: B023
        except Exception as problem:  # too much shared memory, for example
            print(option, str(problem).split("\n")[0][:100], file=sys.stderr, flush=True)
    return sorted(times)[:3]


def tune() -> None:
    "Print JSON: for each kernel and shape the three fastest tiles with their milliseconds."
    found = {}
    for shape in (*BANKS, *SQUARES[2::2]):
        x = stack(shape)
        wide, gram = x.mT if shape[1] > shape[2] else x, symmetric_gram(x)
        found[f"gram {name(shape)}"] = best(TRIED, lambda t: symmetric_launch(wide, tiles=t))  # noqa: B023
        found[f"quintic {name(gram.shape)}"] = best(TRIED, lambda t: symmetric_launch(gram, B, C, True, t))  # noqa: B023
    for shape, dtype in ((HEAD, torch.bfloat16), (LOGITS, torch.uint8)):
        src = torch.ones(shape, dtype=dtype, device="cuda")
        dst = torch.zeros(shape[::-1], dtype=dtype, device="cuda")
        for add in (False, True) if dtype == torch.bfloat16 else (False,):
            run = functools.partial(transpose_launch, dst, src, add)
            found[f"{'add' if add else 'copy'} {name(shape)}"] = best(TRIED_TRANSPOSES, run)
    print(json.dumps(found, indent=None).replace('], "', '],\n "'))


if __name__ == "__main__":
    if "--tune" in sys.argv:
        tune()
    else:
        command_line(__doc__, measure)
