"""Symmetric products and transposes: kernels against float64, in Triton's interpreter and on a GPU, and the operators.

How kernels are tested on a CPU: `tests/kernels.py`.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import speedrun_lib.optimizer as used
from speedrun_lib import symmetric
from speedrun_lib.gpt import build_model
from speedrun_lib.optimizer import Optimizer
from speedrun_lib.polar import POLAR_COEFFICIENTS, plain_gram, plain_quintic, polar_express
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.symmetric import (
    INTERPRETED,
    add_transposed,
    copy_transposed,
    lower_tile,
    symmetric_gram,
    symmetric_launch,
    symmetric_quintic,
    tl,
    transpose_launch,
    transposed,
    triton,
)
from tests.kernels import DEVICES, GPU, HAS_TRITON, ON_GPU, ROOT, few, interpret

PLAIN = pytest.mark.skipif(INTERPRETED, reason="this is about the plain products")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
TYPES = (*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8, torch.int16, torch.int32)
# bf16 keeps 8 bits and fp16 11: half a unit of rounding at most; the interpreter cuts bf16 instead: a whole one
UNIT = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def matrices(*shape, dtype=torch.bfloat16, device="cpu", seed=0):
    "Random numbers, the same on every device."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def units_off(found, exact):
    "Largest error, in units of the last place; numbers far below the typical size count as a sixteenth of that."
    size = exact.abs().clamp(min=float(exact.abs().mean()) / 16)
    return float(((found.double() - exact).abs() / (torch.exp2(size.log2().floor()) * UNIT[found.dtype])).max())


def check_product(found, exact):
    "Rounded once, from a sum in fp32, and equal to its mirror image to the bit."
    assert found.shape == exact.shape and found.is_contiguous()
    assert units_off(found, exact) < (1.03 if INTERPRETED and found.dtype == torch.bfloat16 else 0.53)
    assert torch.equal(found, found.mT)


# ---- kernels, on a CPU in Triton's interpreter


def test_kernels_in_the_interpreter():
    interpret(__file__)


@triton.jit
def order_kernel(out, tiles, GROUP: tl.constexpr):
    "Write down which tile each program gets."
    i, j = lower_tile(tl.program_id(0), tiles, GROUP)
    tl.store(out + 2 * tl.program_id(0), i)
    tl.store(out + 2 * tl.program_id(0) + 1, j)


@DEVICES
@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_tile_of_the_lower_triangle_once(device, group):
    for tiles in (1, 2, 5, 9) if device == "cpu" else (1, 2, 7, 8, 9, 24, 100, 700):
        programs = tiles * (tiles + 1) // 2
        out = torch.full((programs, 2), -1, dtype=torch.int32, device=device)
        order_kernel[programs,](out, tiles, group)
        i, j = out.long().T
        assert (j >= 0).all() and (j <= i).all() and (i < tiles).all()
        assert len((i * tiles + j).unique()) == programs
        assert (i // group == (i // group).sort().values).all(), "one group after the other"


@DEVICES
@pytest.mark.parametrize("dtype", UNIT, ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 64, 64), (2, 40, 100), (1, 33, 1), (2, 1, 33), (1, 150, 136)],
                         ids=str)
def test_gram_against_float64(device, dtype, shape):
    x = matrices(*shape, dtype=dtype, device=device)
    check_product(symmetric_gram(x), plain_gram(x.double()))


@DEVICES
@pytest.mark.parametrize("tiles", [(16, 16, 1, 2, 4, False), (32, 64, 2, 3, 4, True)], ids=str)
def test_any_tile_gives_the_same(device, tiles):
    x = matrices(1, 100, 72, device=device)
    check_product(symmetric_launch(x, tiles=tiles), x.double() @ x.mT.double())
    check_product(symmetric_launch(x.mT, tiles=tiles), x.mT.double() @ x.double())


@DEVICES
@pytest.mark.parametrize("descriptors", [False, True])
def test_sizes_that_are_multiples_of_the_tile(device, descriptors, monkeypatch):
    "No masks; with descriptors, which a view that is not contiguous does without."
    tiles, x = (32, 32, 2, 2, 4, descriptors), matrices(2, 96, 64, device=device)
    for view in (x, x.mT, x[:, :64], x[1:].mT[:, :32]):
        found = symmetric_launch(view, tiles=tiles)
        check_product(found, view.double() @ view.mT.double())
        gram = found / 64
        check_product(symmetric_launch(gram, -2.5, 0.5, True, tiles), plain_quintic(gram.double(), -2.5, 0.5))
    for view in (x[:, :64, :40], x[:, :40, :64], x[:, :40].contiguous()):
        check_product(symmetric_launch(view, tiles=tiles), view.double() @ view.mT.double())
    monkeypatch.setattr(symmetric, "symmetric_kernel" if descriptors else "symmetric_descriptor_kernel", None)
    for view in (x, x.mT):
        symmetric_launch(view, tiles=tiles)


@DEVICES
def test_gram_of_views(device):
    "Strides are the caller's business: a transposed stack, a part of a bank, every second column."
    x = matrices(3, 50, 90, device=device)
    for view in (x.mT, x[:, 3:41, 7:80], x[1:, :, ::2], x[::2], x.mT[:, 5:], x[:, :1].expand(3, 20, 90)):
        check_product(symmetric_gram(view), plain_gram(view.double()))
    gram = torch.zeros(3, 60, 70, device=device, dtype=x.dtype)[:, 3:53, 5:55]
    gram.copy_(symmetric_gram(x) / 64)
    check_product(symmetric_quintic(gram, -2.5, 0.5), plain_quintic(gram.double(), -2.5, 0.5))


@DEVICES
def test_fp32_takes_the_plain_products(device):
    x = matrices(2, 40, 72, dtype=torch.float32, device=device)
    assert torch.equal(symmetric_gram(x), plain_gram(x))
    assert torch.equal(symmetric_quintic(plain_gram(x), -2.5, 0.5), plain_quintic(plain_gram(x), -2.5, 0.5))


@DEVICES
@pytest.mark.parametrize("dtype", UNIT, ids=["bf16", "fp16"])
@pytest.mark.parametrize("side", [1, 72])
def test_quintic_is_rounded_once(device, dtype, side):
    x = matrices(2, side, 2 * side, dtype=dtype, device=device, seed=side) / (2 * side) ** 0.5
    gram = symmetric_gram(x)
    for _, b, c in POLAR_COEFFICIENTS[::2]:
        check_product(symmetric_quintic(gram, b, c), plain_quintic(gram.double(), b, c))
    if side > 1 and dtype == torch.bfloat16:
        assert units_off(plain_quintic(gram, b, c), plain_quintic(gram.double(), b, c)) > 0.6, "the test would see it"


@DEVICES
@given(n=st.integers(1, 3), r=st.integers(1, 90), c=st.integers(1, 90))
@few
def test_gram_of_any_shape(device, n, r, c):
    x = matrices(n, r, c, device=device, seed=r)
    found = symmetric_gram(x)
    check_product(found, plain_gram(x.double()))
    check_product(symmetric_quintic(found, -1.5, 0.25), plain_quintic(found.double(), -1.5, 0.25))


def bits(x):
    "Numbers as they are stored."
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


@DEVICES
@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("shape", [(1, 1), (64, 128), (70, 150), (1, 200), (131, 3)], ids=str)
def test_transposed_to_the_bit(device, dtype, shape):
    m, n = shape
    x = torch.randint(0, 256, (m, n * torch.empty((), dtype=dtype).itemsize), dtype=torch.uint8).to(device).view(dtype)
    found = transposed(x)
    assert found.shape == (n, m) and found.dtype == dtype and found.is_contiguous()
    assert torch.equal(bits(found), bits(x.T)), "NaNs and infinities included"
    target = torch.zeros_like(found)
    assert copy_transposed(target, x) is None and torch.equal(bits(target), bits(found))


@DEVICES
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: str(t)[6:])
@given(m=st.integers(1, 80), n=st.integers(1, 80))
@few
def test_added_in_fp32_and_rounded_once(device, dtype, m, n):
    x, start = matrices(m, n, dtype=dtype, device=device), matrices(n, m, dtype=dtype, device=device, seed=1)
    found = start.clone()
    assert add_transposed(found, x) is None
    exact = start.float() + x.T.float()
    if INTERPRETED and dtype == torch.bfloat16:
        assert ((found.float() - exact).abs() <= UNIT[dtype] * exact.abs()).all()
    else:
        assert torch.equal(found, exact.to(dtype))


@DEVICES
@pytest.mark.parametrize("tiles", [(16, 64, 4), (128, 16, 8)], ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_transposes_with_any_tile(device, tiles, add):
    x, found = matrices(70, 150, dtype=torch.float32, device=device), torch.ones(150, 70, device=device)
    transpose_launch(found, x, add, tiles)
    assert torch.equal(found, x.T + 1 if add else x.T)


@DEVICES
def test_nothing_is_a_matrix_too(device):
    for shape in ((0, 3, 4), (2, 0, 4), (2, 5, 0)):
        assert symmetric_gram(matrices(*shape, device=device)).shape == (shape[0], min(shape[1:]), min(shape[1:]))
    assert symmetric_quintic(matrices(0, 4, 4, device=device), 1.0, 2.0).shape == (0, 4, 4)
    assert transposed(matrices(0, 5, device=device)).shape == (5, 0)


@ON_GPU
def test_more_numbers_than_32_bits_count(device):
    "The gradient of the logits in the record's last stage: 49,152 x 50,304 in FP8."
    m, n = 49_152, 50_304
    x = torch.randint(0, 256, (m, n), dtype=torch.uint8, device=device)
    found = transposed(x.view(torch.float8_e5m2)).view(torch.uint8)
    for part in (slice(0, 700), slice(24_000, 24_500), slice(m - 700, m)):
        assert torch.equal(found[:, part], x[part].T)


@ON_GPU
@pytest.mark.parametrize("shape", [(6, 3072, 768), (5, 768, 768), (12, 256, 768), (1, 1100, 1500)], ids=str)
def test_the_shapes_of_the_banks(device, shape):
    x = matrices(*shape, device=device) / max(shape) ** 0.5
    gram = symmetric_gram(x)
    check_product(gram, plain_gram(x.double()))
    check_product(symmetric_quintic(gram, -2.8, 0.5), plain_quintic(gram.double(), -2.8, 0.5))


COMPILED = {  # kernel -> types of its arguments, constants, and what its code for an H100 has to hold
    "symmetric_kernel": (
        {"x": "*bf16", "out": "*bf16", "b": "fp32", "c": "fp32"},
        {"QUINTIC": True, "EVEN": False, "FP32_DOT": False, "BLOCK": 64, "BLOCK_K": 32, "GROUP": 8, "stride_inner": 1},
        ("wgmma.mma_async", "cp.async")),
    "symmetric_descriptor_kernel": (
        {"x": "tensordesc<bf16[32, 64]>", "x_tile": "tensordesc<bf16[64, 64]>", "out": "tensordesc<bf16[64, 64]>",
         "b": "fp32", "c": "fp32"},
        {"TALL": True, "QUINTIC": True, "FP32_DOT": False, "BLOCK": 64, "BLOCK_K": 32, "GROUP": 8},
        ("wgmma.mma_async", "cp.async.bulk.tensor")),
    "transpose_kernel": ({"src": "*bf16", "dst": "*bf16"}, {"ADD": True, "BLOCK_M": 32, "BLOCK_N": 32}, ("st.global",)),
}


def for_an_h100(kernel, warps=4, stages=3, types=(), **constants):
    "Compile a kernel of `COMPILED` without a GPU, on request with other types and constants."
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, (usual_types, usual_constants, _) = getattr(symmetric, kernel), COMPILED[kernel]
    types, constants = usual_types | dict(types), usual_constants | constants
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    values = {(names.index(n),): value for n, value in constants.items()}
    even = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n] in ("i32", "*bf16")}
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=even)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@PLAIN
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("kernel", COMPILED)
def test_kernels_compile_for_an_h100_without_one(kernel):
    code = for_an_h100(kernel)
    assert all(instruction in code.asm["ptx"] for instruction in COMPILED[kernel][2])


@PLAIN
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_two_programs_with_an_h100s_tiles_share_a_processor():
    block, block_k, group, stages, warps, descriptors = symmetric.SYMMETRIC_TILES["9"]
    assert descriptors
    types = {name: f"tensordesc<bf16[{block}, {width}]>"
             for name, width in (("x", block_k), ("x_tile", block), ("out", block))}
    code = for_an_h100("symmetric_descriptor_kernel", warps, stages, types, TALL=False, QUINTIC=False, BLOCK=block,
                       BLOCK_K=block_k, GROUP=group)
    assert code.metadata.shared <= 113 * 1024, "of 227 KB"


@PLAIN
@pytest.mark.parametrize(("capability", "row"), [((8, 0), "8"), ((9, 0), "9"), ((12, 0), "fallback")], ids=str)
@pytest.mark.parametrize("table", ["SYMMETRIC_TILES", "TRANSPOSE_TILES"])
def test_each_architecture_has_its_tiles(monkeypatch, table, capability, row):
    monkeypatch.setattr(symmetric, "capability_of", lambda device: capability)
    tiles = getattr(symmetric, table)
    assert symmetric.tiles_for(torch.zeros(1), tiles) == tiles.get(row, tiles["fallback"])


# ---- the network's use of them


@PLAIN
@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 40, 24), (3, 16, 16)], ids=str)
def test_plain_products_leave_polar_express_as_it_was(shape):
    u = matrices(*shape, dtype=torch.float32)
    assert torch.equal(polar_express(u, symmetric_gram, symmetric_quintic), polar_express(u))


@DEVICES
@pytest.mark.parametrize("shape", [(2, 40, 72), (2, 72, 40), (2, 48, 48)], ids=str)
def test_polar_express_by_kernels(device, shape):
    "As near to the exact iteration as with plain products in bf16."
    u = matrices(*shape, device=device)
    exact = polar_express(u.double().cpu())
    error, plain = (float((polar_express(u, *products).cpu().double() - exact).norm() / exact.norm())
                    for products in ((symmetric_gram, symmetric_quintic), ()))
    assert error < (2.5 if INTERPRETED else 1.2) * plain and plain < 0.1


def one_step(rung, change=None, monkeypatch=None):
    "Network of size nano after an odd step, tied, with the same gradients for every rung."
    torch.manual_seed(0)
    recipe = recipe_for(rung, "nano")
    model = build_model(recipe, SIZES["nano"])
    optimizer, generator = Optimizer(recipe, model), torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    for name, function in (change or {}).items():
        monkeypatch.setattr(used, name, function)
    optimizer.step_number = 1
    optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@PLAIN
def test_the_rung_changes_no_weight_without_kernels():
    before, after = one_step("bf16_weights"), one_step("symmetric")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(after["embed"], after["lm_head"].T), "tied"


FAULTS = {  # what goes wrong -> functions of the optimizer, and the parameters that show it
    "no gram": ({"symmetric_gram": lambda x: torch.zeros_like(plain_gram(x))}, {"qk_bank", "vo_bank", "mlp_bank"}),
    "no mirror": ({"symmetric_quintic": lambda a, b, c: plain_quintic(a, b, c).tril()},
                  {"qk_bank", "vo_bank", "mlp_bank"}),
    "no gradient of the embedding": ({"add_transposed": lambda dst, src: None}, {"lm_head", "embed"}),
    "embedding left alone": ({"copy_transposed": lambda dst, src: None}, {"embed"}),
}


@PLAIN
@pytest.mark.parametrize("fault", FAULTS)
def test_the_optimizer_uses_all_four(fault, monkeypatch):
    functions, shown = FAULTS[fault]
    right, wrong = one_step("symmetric"), one_step("symmetric", functions, monkeypatch)
    assert {name for name in right if not torch.equal(right[name], wrong[name])} == shown


# ---- the operators


def test_registrations():
    x = matrices(2, 5, 7, dtype=torch.float32)
    for stack in (x, x.mT, x[:, 1:4, ::2]):
        torch.library.opcheck(symmetric_gram, (stack,))
    torch.library.opcheck(symmetric_quintic, (plain_gram(x), 0.5, 2.0))
    torch.library.opcheck(transposed, (x[0],))
    for op in (copy_transposed, add_transposed):
        torch.library.opcheck(op, (torch.ones(7, 5), x[0]))


@pytest.mark.parametrize("device", [pytest.param("cpu", id="here"), pytest.param("cuda", marks=GPU)])
def test_in_a_compiled_function(device):
    "One graph, for stacks of any number of matrices; on a CPU without a C++ compiler's minutes."
    torch._dynamo.reset()
    compiler = torch.compile(fullgraph=True, dynamic=True, backend="inductor" if device == "cuda" else "aot_eager")

    def step(x, target):
        add_transposed(target, x[0])
        return symmetric_quintic(symmetric_gram(x), -1.5, 0.5) + 1, transposed(x[0])

    compiled = compiler(step)
    for n, r, c in ((2, 48, 32), (3, 48, 32), (4, 64, 96)):
        x = matrices(n, r, c, device=device) / 8
        targets = torch.ones(2, c, r, device=device, dtype=x.dtype)
        for a, b in zip(compiled(x, targets[0]), step(x, targets[1]), strict=True):
            assert torch.equal(a, b) and a.dtype == x.dtype
        assert torch.equal(*targets) and not torch.equal(targets[0], torch.ones_like(targets[0]))
    torch._dynamo.reset()


def test_a_parameter_is_updated_in_place():
    p = torch.nn.Parameter(torch.zeros(4, 3))
    with torch.no_grad():
        copy_transposed(p, torch.ones(3, 4))
        add_transposed(p, torch.ones(3, 4))
    assert (p == 2).all() and p.requires_grad


def test_a_transposed_copy_never_shares_memory():
    "Not even where the transpose of a matrix of one row has the same numbers in the same order."
    x = torch.zeros(1, 5)
    transposed(x).fill_(1)
    assert (x == 0).all()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: symmetric_gram(torch.zeros(3, 4)), r"stack of matrices \(n, r, c\), not \(3, 4\)"),
    (lambda: symmetric_quintic(torch.zeros(2, 3, 4), 1.0, 1.0), r"square matrices \(n, s, s\), not \(2, 3, 4\)"),
    (lambda: transposed(torch.zeros(3, 4).T), r"\(4, 3\) torch.float32 with strides \(1, 4\): call .contiguous\(\)"),
    (lambda: transposed(torch.zeros(3)), "takes a contiguous matrix"),
    (lambda: transposed(torch.zeros(3, 4).double()), "1-, 2- or 4-byte numbers"),
    (lambda: copy_transposed(torch.zeros(3, 4), torch.zeros(3, 4)), r"target of shape \(4, 3\)"),
    (lambda: copy_transposed(torch.zeros(3, 4).T, torch.zeros(3, 4)), "contiguous target"),
    (lambda: add_transposed(torch.zeros(4, 3).half(), torch.zeros(3, 4)), "torch.float32, not .* torch.float16"),
    (lambda: add_transposed(torch.zeros(4, 3).char(), torch.zeros(3, 4).char()), "or fp32 numbers, not torch.int8"),
])
def test_refusals_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_triton():
    "Where there is no Triton the module is imported all the same, and plain products do the work."
    code = ("import sys; sys.modules['triton'] = None\n"
            "import torch\nfrom speedrun_lib.symmetric import symmetric_gram, transposed, triton\n"
            "x = torch.randn(2, 3, 4)\n"
            "assert torch.equal(symmetric_gram(x), x @ x.mT) and torch.equal(transposed(x[0]), x[0].T)\n"
            "assert not hasattr(triton, 'cdiv')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
