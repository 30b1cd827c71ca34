"""Fused MLP and fused loss: kernels against plain PyTorch, in Triton's interpreter and on a GPU, and the operators.

How kernels are tested on a CPU: `tests/kernels.py`.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from speedrun_lib import fused, gpt
from speedrun_lib.fp8 import GRADIENT_SCALE, decided_fp8
from speedrun_lib.fused import (
    LOSS_TILES,
    MLP_GRADIENT_TILES,
    FusedHeadLoss,
    FusedMLP,
    fused_head_loss,
    fused_relu2_mlp,
    linear_relu2,
    linear_relu2_launch,
    plain_softcapped_losses,
    softcapped_launch,
    softcapped_losses,
)
from speedrun_lib.logits import softcap
from speedrun_lib.mtp import mtp_losses
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.relu2 import relu2_mlp
from tests.kernels import DEVICES, GPU, ON_GPU, few, interpret

BF16, E5M2 = torch.bfloat16, torch.float8_e5m2


def random(*shape, seed=0, scale=1.0, dtype=torch.float64, device="cpu"):
    "Normal numbers, the same on every device."
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


def off(found, exact):
    "Norm of the difference over the norm."
    return float((found.double() - exact).norm() / exact.norm())


def test_kernels_in_the_interpreter():
    interpret(__file__)


# ---- the MLP


def test_the_root_of_the_square_is_the_number_to_the_bit():
    "Rounding moves a square by half a step at most, its root by less: the nearest number is the old one."
    r = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    r = torch.cat([r[:1], r[(r > 2.0**-63) & (r < 2.0**63)]])
    assert len(r) > 16_000 and torch.equal(r.square().sqrt(), r)
    assert not torch.equal(r.square().float().sqrt(), r.float()), "without rounding the root it is not"


def mlp_inputs(t, d, n, device="cpu", dtype=BF16):
    "Inputs, two matrices, a gradient of the output."
    shapes = (t, d), (n, d), (n, d), (t, d)
    return [random(*shape, seed=seed, scale=scale, dtype=dtype, device=device)
            for seed, (shape, scale) in enumerate(zip(shapes, (1, d**-0.5, d**-0.5, 1), strict=True))]


MLP_SHAPES = pytest.mark.parametrize(("t", "d", "n"), [(37, 48, 56), (1, 8, 8), (130, 64, 264), (256, 32, 256)])


@DEVICES
@MLP_SHAPES
def test_linear_relu2_and_its_gradient(device, t, d, n):
    x, up, down, grad = mlp_inputs(t, d, n, device)
    pre = x.double() @ up.double().T
    post = linear_relu2(x, up, None)
    assert post.shape == (t, n) and post.dtype == BF16 and post.is_contiguous()
    assert off(post, pre.relu().square()) < 6e-3 and ((post > 0) == (pre.bfloat16() > 0)).all()
    # against the plain form with pre, from the same products in fp32: equal but where a sum ends near a border
    rounded = (x.float() @ up.float().T).bfloat16()
    assert (post != rounded.relu().square()).float().mean() < 0.01
    pre_grad = linear_relu2(grad, down, post)
    plain = 2 * (grad.float() @ down.float().T).bfloat16() * rounded.relu()
    assert pre_grad.shape == (t, n) and (pre_grad != plain).float().mean() < 0.02
    assert off(pre_grad, 2 * (grad.double() @ down.double().T) * pre.relu()) < 6e-3


@DEVICES
@pytest.mark.parametrize("tiles", [(16, 32, 16, 2, 4), (32, 64, 32, 3, 4), *MLP_GRADIENT_TILES.values()])
def test_tiles_do_not_matter(device, tiles):
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs tensor descriptors")
    if device == "cuda" and tiles[0] < 64:
        tiles = (64, *tiles[1:])  # what tensor cores of Hopper multiply at least
    x, up, down, grad = mlp_inputs(100, 72, 200, device)
    post = linear_relu2_launch(x, up, None, tiles)
    assert off(post, linear_relu2(x, up, None).double()) < 1e-3
    assert off(linear_relu2_launch(grad, down, post, tiles), linear_relu2(grad, down, post).double()) < 1e-3


@DEVICES
@pytest.mark.parametrize("shape", [(1, 37), (2, 20)])
def test_fused_mlp_against_relu2_mlp(device, shape):
    x, up, down, grad = mlp_inputs(shape[0] * shape[1], 48, 192, device)
    found, exact = [], []
    for function, dtype, results in ((fused_relu2_mlp, BF16, found), (relu2_mlp, torch.float64, exact)):
        inputs = [y.detach().to(dtype).requires_grad_() for y in (x.view(*shape, 48), up, down)]
        out = function(*inputs)
        results += [out.detach(), *torch.autograd.grad(out, inputs, grad.view(*shape, 48).to(dtype))]
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == BF16 and a.shape == b.shape and off(a, b) < 8e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_on_a_cpu_the_fused_mlp_is_the_plain_one(dtype):
    x, up, down, _ = mlp_inputs(12, 8, 32, dtype=dtype)
    assert torch.equal(fused_relu2_mlp(x.view(3, 4, 8), up, down), relu2_mlp(x.view(3, 4, 8), up, down))


def test_gradients_of_the_fused_mlp():
    inputs = [y.requires_grad_() for y in mlp_inputs(5, 8, 16, dtype=torch.float64)[:3]]
    assert torch.autograd.gradcheck(FusedMLP.apply, inputs)


def test_bf16_gradients_equal_those_from_a_stored_pre_activation_to_the_bit():
    x, up, down, grad = mlp_inputs(40, 32, 128)
    results = []
    for function in (FusedMLP.apply, relu2_mlp):
        inputs = [y.detach().requires_grad_() for y in (x, up, down)]
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_fused_mlp_keeps_one_tensor_between_the_matrices():
    x, up, down, _ = mlp_inputs(40, 32, 128)
    kept = {FusedMLP.apply: [], relu2_mlp: []}
    for function, shapes in kept.items():
        inputs = [y.detach().requires_grad_() for y in (x, up, down)]
        with torch.autograd.graph.saved_tensors_hooks(lambda y: shapes.append(tuple(y.shape)) or y, lambda y: y):  # noqa: B023
            function(*inputs)
    assert kept[FusedMLP.apply].count((40, 128)) == 1 < kept[relu2_mlp].count((40, 128))


@pytest.mark.parametrize(("change", "message"), [
    (lambda x, up, post: (x[:, :-8], up, post), "cannot multiply"),
    (lambda x, up, post: (x, up, post[:-1]), "needs post of shape"),
    (lambda x, up, post: (x.float(), up, post), "one dtype"),
    (lambda x, up, post: (x, up.T.contiguous().T, post), "contiguous"),
])
def test_the_mlp_kernel_refuses(change, message):
    x, up, _, _ = mlp_inputs(16, 24, 32)
    with pytest.raises(ValueError, match=message):
        linear_relu2(*change(x, up, torch.zeros(16, 32, dtype=BF16)))


@DEVICES
def test_the_mlp_kernel_refuses_rows_that_descriptors_cannot_address(device):
    x, up, _, _ = mlp_inputs(16, 20, 32, device)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        linear_relu2(x, up, None)


# ---- the loss


TOY_Z = torch.tensor([[0.5 * i - 0.3 * j + 0.1 * i * j for i in range(8)] for j in range(4)], dtype=torch.float64)
TOY_TARGETS, TOY_WEIGHTS = torch.tensor([3, 1, 1, 6]), torch.tensor([1, 0.5, 0.25])
TOY_LOSSES = [4.793929207, 5.420445831, 4.348059977, 1.405153623]
TOY_ROWS = {0: [0.0380331, -0.4518837, 0.0710709, -0.5432834, 0.1275033, 0.1680548, 0.2190735, 0.2824031],
            3: [0.0144215, 0.0245040, 0.0406613, 0.0657725, 0.1035615, 0.1585570, -0.3135543, 0.3409121]}


def close(found, expected, atol):
    "Equal up to an absolute tolerance."
    found, expected = (torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (found, expected))
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_numbers_of_the_specification():
    losses, grad = plain_softcapped_losses(TOY_Z, TOY_TARGETS, TOY_WEIGHTS.double())
    close(losses, TOY_LOSSES, 6e-10)
    for row, expected in TOY_ROWS.items():
        close(grad[row], expected, 6e-8)
    z = TOY_Z.clone().requires_grad_()
    mtp_losses(softcap(z)[None], TOY_TARGETS[None], TOY_WEIGHTS.double()).sum().backward()
    close(z.grad, grad, 1e-15)


@DEVICES
def test_numbers_of_the_specification_by_the_kernel(device):
    "bf16 logits: the toy's are rounded first; the kernel keeps tanh in 11 bits, and a GPU computes no more of it."
    z, weights = TOY_Z.bfloat16().to(device), TOY_WEIGHTS.to(device)
    expected = plain_softcapped_losses(z.double().cpu(), TOY_TARGETS, TOY_WEIGHTS.double())
    losses, grad = softcapped_losses(z, TOY_TARGETS.to(device), weights, torch.float32)
    close(losses, expected[0], 8e-3 if device == "cpu" else 3e-2)
    close(grad, expected[1], 1e-3 if device == "cpu" else 5e-3)
    assert (losses.cpu() - torch.tensor(TOY_LOSSES)).abs().max() < 0.05


def loss_inputs(t, v, n, seed=0, repeats=False):
    "Logits, targets and weights; on request many targets are equal."
    z = random(t, v, seed=seed, scale=7.0).bfloat16()
    targets = torch.randint(0, 2 if repeats else v, (t,), generator=torch.Generator().manual_seed(seed + 1))
    return z, targets, torch.tensor([1.0, 0.5, 0.25])[:n]


def by_autograd(z, targets, weights):
    "Losses and gradient in fp64."
    z = z.double().requires_grad_()
    losses = mtp_losses(softcap(z)[None], targets[None], weights.double())[0]
    return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]


@given(t=st.integers(1, 9), v=st.integers(2, 40), n=st.integers(1, 3), repeats=st.booleans())
@settings(few, max_examples=30)
def test_the_formulas_against_autograd(t, v, n, repeats):
    z, targets, weights = loss_inputs(t, v, n, repeats=repeats)
    for found, exact in zip(plain_softcapped_losses(z.double(), targets, weights.double()),
                            by_autograd(z, targets, weights), strict=True):
        torch.testing.assert_close(found, exact, atol=1e-12, rtol=1e-9)


@DEVICES
@given(t=st.integers(1, 6), v=st.sampled_from([2, 63, 64, 65, 200]), n=st.integers(1, 3), repeats=st.booleans(),
       tiles=st.sampled_from([(64, 4, 1), (32, 4, 3), (128, 4, 3)]))
@few
def test_the_loss_kernel_against_autograd(device, t, v, n, repeats, tiles):
    z, targets, weights = loss_inputs(t, v, n, repeats=repeats)
    exact_losses, exact_grad = by_autograd(z, targets, weights)
    # e5m2 rounds by an eighth at most; the interpreter cuts, by a quarter at most
    limits = {torch.float32: 1.5e-2, BF16: 2e-2, E5M2: 0.26} if device == "cpu" else {
        torch.float32: 3e-2, BF16: 3e-2, E5M2: 0.15}
    for dtype, limit in limits.items():
        unit = GRADIENT_SCALE if dtype == E5M2 else 1
        losses, grad = softcapped_launch(*(x.to(device) for x in (z, targets, weights)), dtype, tiles)
        assert losses.dtype == torch.float32 and grad.dtype == dtype and grad.shape == z.shape
        close(losses, exact_losses, 8e-3 if device == "cpu" else 3e-2)
        assert off(unit * grad.double().cpu(), exact_grad) < limit


@DEVICES
def test_the_loss_kernel_on_rows_of_full_length(device):
    t = 3 if device == "cpu" else 700
    z, targets, weights = loss_inputs(t, 50_304, 3)
    targets[:2] = torch.tensor([0, 50_303])
    exact_losses, exact_grad = by_autograd(z[:5], targets[:5], weights)
    losses, grad = softcapped_losses(*(x.to(device) for x in (z, targets, weights)), torch.float32)
    rows = 5 - 2 * (t > 5)  # the last rows of the short copy lack targets
    close(losses[:rows], exact_losses[:rows], 3e-2)
    assert off(grad[:rows].cpu(), exact_grad[:rows]) < 2e-2
    again = softcapped_losses(*(x.to(device) for x in (z, targets, weights)), torch.float32)
    assert torch.equal(again[0], losses) and torch.equal(again[1], grad), "no row writes where another one does"


@DEVICES
@pytest.mark.parametrize("name", LOSS_TILES)
def test_the_tables_of_tiles(device, name):
    z, targets, weights = loss_inputs(4, 9_000, 2)
    losses, grad = softcapped_launch(*(x.to(device) for x in (z, targets, weights)), BF16, LOSS_TILES[name])
    exact_losses, exact_grad = by_autograd(z, targets, weights)
    close(losses, exact_losses, 3e-2)
    assert off(grad.cpu(), exact_grad) < 2e-2


@ON_GPU
def test_more_logits_than_32_bits_can_count(device):
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB")
    t, v = 43_200, 50_304  # 2.17e9
    z = torch.randn(t, v, device=device, dtype=BF16)
    targets = torch.randint(0, v, (t,), device=device)
    weights = torch.tensor([1.0, 0.5, 0.25], device=device)
    losses, grad = softcapped_losses(z, targets, weights, E5M2)
    for rows in (slice(0, 50), slice(t - 50, t)):
        alone, alone_grad = softcapped_losses(z[rows], targets[rows], weights, E5M2)
        whole = slice(0, 48) if rows.start == 0 else slice(0, 50)
        assert torch.equal(losses[rows][whole], alone[whole])
        assert torch.equal(grad[rows][whole].view(torch.uint8), alone_grad[whole].view(torch.uint8))


def test_eight_bits_of_the_gradient():
    "The stored number is the gradient over its scale; below half of the smallest number nothing is left."
    z, targets, weights = loss_inputs(8, 300, 3)
    exact = by_autograd(z, targets, weights)[1]
    grad = softcapped_losses(z, targets, weights, E5M2)[1]
    assert torch.equal(grad.double() * 0 == 0, torch.ones_like(exact, dtype=torch.bool))
    assert off(GRADIENT_SCALE * grad.double(), exact) < 0.08
    lost = (grad.float() == 0) & (exact != 0)
    assert exact[lost].abs().max() <= 1.01 * GRADIENT_SCALE * 2**-17


def test_zero_weights_change_nothing():
    z, targets, weights = loss_inputs(6, 50, 2)
    padded = torch.cat([weights, torch.zeros(1)])
    results = (softcapped_losses(z, targets, w, BF16) for w in (weights, padded))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@DEVICES
@pytest.mark.parametrize("weights", [[1, 0.5, 0], [1, 0, 0]], ids=str)
def test_the_kernel_takes_the_weights_of_later_stages(device, monkeypatch, weights):
    "Three of them, the last ones zero; and bf16 logits go to the kernel."
    calls = []
    monkeypatch.setattr(fused, "softcapped_launch", lambda *a: calls.append(a) or softcapped_launch(*a))
    z, targets, _ = loss_inputs(6, 65, 3, repeats=True)
    exact = by_autograd(z, targets, torch.tensor(weights, dtype=torch.float32))
    inputs = [x.to(device) for x in (z.bfloat16(), targets, torch.tensor(weights, dtype=torch.float32))]
    losses, grad = softcapped_losses(*inputs, torch.float32)
    assert len(calls) == 1 and off(losses.cpu(), exact[0]) < 3e-2 and off(grad.cpu(), exact[1]) < 3e-2


@pytest.mark.parametrize(("change", "message"), [
    (lambda z, t, w: (z[None], t, w), "takes logits"), (lambda z, t, w: (z, t[1:], w), "takes logits"),
    (lambda z, t, w: (z, t.int(), w), "int64"), (lambda z, t, w: (z, t, w[None]), "takes logits"),
    (lambda z, t, w: (z.T.contiguous().T, t, w), "contiguous"),
])
def test_the_loss_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        softcapped_losses(*change(*loss_inputs(6, 50, 2)), BF16)


# ---- the head


def head_inputs(t, d, v, dtype=torch.float64, device="cpu"):
    "Normed x, a head, targets and weights."
    x = torch.nn.functional.rms_norm(random(t, d), (d,)).to(device, dtype)
    w = random(d, v, seed=1, scale=0.3).to(device, dtype)
    targets = torch.randint(0, v, (t,), generator=torch.Generator().manual_seed(2)).to(device)
    return x, w, targets, torch.tensor([1.0, 0.5, 0.25], device=device)


def gradients(function, x, w, *rest, factor=1.0):
    "Loss and gradients."
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss = function(x, w, *rest)
    return loss.detach(), *torch.autograd.grad(factor * loss, (x, w))


def plain_head_loss(x_td, w_dv, targets_t, weights_n):
    return mtp_losses(softcap(x_td @ w_dv)[None], targets_t[None], weights_n)[0].sum()


@pytest.fixture
def fp8_head(monkeypatch):
    "Emulate FP8."
    monkeypatch.setenv("SPEEDRUN_FP8", "1")
    decided_fp8.cache_clear()
    yield
    monkeypatch.undo()
    decided_fp8.cache_clear()


def test_on_a_cpu_the_head_is_exact():
    inputs = head_inputs(10, 16, 40)
    assert torch.equal(fused_head_loss(*inputs), plain_head_loss(*inputs))
    found, exact = (gradients(function, *inputs, factor=3.0) for function in (FusedHeadLoss.apply, plain_head_loss))
    for a, b in zip(found, exact, strict=True):
        assert off(a, b) < 1e-6  # the losses of the operator are fp32


def test_bf16_scores_enter_the_loss_in_fp32():
    inputs = head_inputs(10, 16, 40, BF16)
    assert fused_head_loss(*inputs).dtype == torch.float32
    close(fused_head_loss(*inputs), plain_head_loss(inputs[0].float(), inputs[1].float(), *inputs[2:]), 0.3)


def test_the_head_in_eight_bits(fp8_head):
    inputs, plain = head_inputs(32, 64, 96, BF16), head_inputs(32, 64, 96)
    for factor in (1.0, 3.0):
        found = gradients(fused_head_loss, *inputs, factor=factor)
        exact = gradients(plain_head_loss, *plain, factor=factor)
        assert [x.dtype for x in found] == [torch.float32, BF16, BF16]
        for a, b, limit in zip(found, exact, (5e-3, 0.12, 0.12), strict=True):
            assert off(a, b) < limit


def test_of_the_logits_only_the_gradient_is_kept(fp8_head):
    x, w, *rest = head_inputs(16, 32, 48, BF16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append((tuple(y.shape), y.dtype)) or y, lambda y: y):
        fused_head_loss(x.requires_grad_(), w.requires_grad_(), *rest)
    assert sorted(map(str, kept)) == sorted(map(str, [
        ((16, 32), torch.float8_e4m3fn), ((32, 48), torch.float8_e4m3fn), ((16, 48), E5M2)]))


@ON_GPU
def test_the_head_on_a_gpu(device):
    x, w, targets, weights = head_inputs(256, 64, 1024, BF16, device)
    exact = gradients(plain_head_loss, x.double(), w.double(), targets, weights)
    for a, b, limit in zip(gradients(fused_head_loss, x, w, targets, weights), exact, (5e-3, 0.12, 0.12), strict=True):
        assert off(a, b) < limit


@ON_GPU
def test_memory_of_the_head_on_a_gpu(device):
    "Logits are gone when the forward ends, and the backward adds one transposed copy of the gradient."
    t, d, v = 4096, 768, 50_304
    x, w, targets, weights = head_inputs(t, d, v, BF16, device)
    fused_head_loss(x.requires_grad_(), w.requires_grad_(), targets, weights).backward()
    x.grad = w.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = fused_head_loss(x, w, targets, weights)
    assert torch.cuda.memory_allocated() - before < 1.35 * t * v + 2 * d * v
    assert torch.cuda.max_memory_allocated() - before < 3.2 * t * v + 8 * d * v, "bf16 logits beside an e5m2 gradient"
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 2.2 * t * v + 8 * d * v


# ---- operators and the compiler


def test_operator_registrations():
    x, up, _, _ = mlp_inputs(6, 8, 16, dtype=torch.float32)
    torch.library.opcheck(linear_relu2, (x, up, None))
    torch.library.opcheck(linear_relu2, (x, up, torch.rand(6, 16)))
    torch.library.opcheck(softcapped_losses, (*loss_inputs(5, 20, 3), torch.float32))
    torch.library.opcheck(softcapped_losses, (*loss_inputs(5, 20, 3), E5M2))


@pytest.mark.parametrize("device", [pytest.param("cpu", id="host"), pytest.param("cuda", marks=GPU)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_compilation_for_all_numbers_of_tokens(device, request):
    "Both functions in one graph, forward and backward, with a dynamic number of tokens."
    if device == "cpu":
        request.getfixturevalue("fp8_head")
    torch._dynamo.reset()
    dtype, d = BF16, 64
    _, up, down, _ = mlp_inputs(1, d, 256, device, dtype)
    _, w, _, weights = head_inputs(1, d, 512, dtype, device)

    def network(x_td, targets_t):
        mlp = fused_relu2_mlp if device == "cuda" else lambda x, u, v: FusedMLP.apply(x[0], u, v)[None]
        return fused_head_loss(mlp(x_td[None], up, down)[0], w, targets_t, weights)

    counter, counts = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager"), []
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=True)
    for t in (32, 48, 80):
        x = random(t, d, seed=t, dtype=dtype, device=device)
        targets = torch.randint(0, 512, (t,), device=device)
        losses, grads = [], []
        for function in (network, compiled):
            y = x.clone().requires_grad_()
            losses.append(function(y, targets))
            grads.append(torch.autograd.grad(losses[-1], y)[0])
        assert off(losses[1].detach(), losses[0].detach().double()) < 3e-3 and off(grads[1], grads[0].double()) < 3e-2
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]
    torch._dynamo.reset()


# ---- the network


def nano(rung):
    "A network of size nano away from its start, and a batch with documents."
    torch.manual_seed(0)
    model = gpt.build_model(recipe_for(rung, "nano"), SIZES["nano"])
    with torch.no_grad():
        for p in model.parameters():
            p += (0.05 * torch.randn(p.shape)).to(p.dtype)
    tokens = torch.randint(0, 257, (1, 33))
    borders = torch.tensor([0, 20, 32, 32], dtype=torch.int32), torch.tensor(32, dtype=torch.int32)
    return model, (tokens[:, :-1], tokens[:, 1:], *borders)


def test_the_network_sends_every_mlp_through_the_fused_one(monkeypatch):
    model, batch = nano("fused_mlp")
    seen = []

    def noted(x_btd, up_w, down_w):
        seen.append((x_btd.pow(2).mean().item(), up_w.data_ptr(), down_w.data_ptr()))
        return fused_relu2_mlp(x_btd, up_w, down_w)

    monkeypatch.setattr(gpt, "fused_relu2_mlp", noted)
    loss = model(*batch)
    bank = model.mlp_bank
    assert [pair for _, *pair in seen] == [[bank[2 * i].data_ptr(), bank[2 * i + 1].data_ptr()] for i in range(11)]
    assert all(abs(size - 1) < 0.02 for size, _, _ in seen), "normed inputs"
    plain, _ = nano("symmetric")
    assert torch.equal(plain(*batch), loss)


def test_the_network_trains_on_the_fused_loss_and_evaluates_on_the_plain_one(monkeypatch):
    model, batch = nano("fused_loss")
    calls = []

    def noted(x_td, w_dv, targets_t, weights_n):
        calls.append((x_td.shape, w_dv is model.lm_head, torch.equal(targets_t, batch[1][0]), weights_n.tolist()))
        return fused_head_loss(x_td, w_dv, targets_t, weights_n)

    monkeypatch.setattr(gpt, "fused_head_loss", noted)
    loss = model(*batch)
    assert len(calls) == 1 and calls[0][:3] == (torch.Size([32, 128]), True, True)
    assert [w for w in calls[0][3] if w] == [1, 0.5, 0.25]
    plain, _ = nano("fused_mlp")
    assert off(loss.detach(), plain(*batch).detach().double()) < 2e-3 and loss > 32
    model.eval()
    assert off(model(*batch).detach(), plain.eval()(*batch).detach().double()) < 1e-6 and len(calls) == 1


def test_the_loss_at_the_start_is_near_chance():
    x = torch.nn.functional.rms_norm(random(64, 768), (768,)).bfloat16()
    w = random(768, 4096, scale=0.005).bfloat16()
    targets = torch.randint(0, 4096, (64,))
    assert abs(fused_head_loss(x, w, targets, torch.ones(1)).item() / 64 - math.log(4096)) < 0.05
