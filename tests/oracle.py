"""Numbers of the record's network and optimizer for any configuration, as JSON: compare them with the original's.

`python -m tests.oracle --record 82 --tokens 64 --documents 0,20,50,64 --short 8 --long 24` fills every parameter from a
hash, runs the network in fp64 on 64 hashed tokens, and prints losses and gradient norms.

`python -m tests.oracle --steps CONFIG.json` trains such a network for a short schedule with all transitions
of the record and prints losses, distances from the start and evaluations. Keys and their defaults: `CONFIG` below. With
`"gradients": "prescribed"` there is no network: the gradients are hashed numbers, and `"matrices"` may name the only
matrices of a bank to follow.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from speedrun_lib import gpt, optimizer
from speedrun_lib.mtp import mtp_losses, mtp_weights
from speedrun_lib.mudd import initial_mudd_bias
from speedrun_lib.polar import polar_express
from speedrun_lib.recipe import SIZES, recipe_for
from speedrun_lib.schedules import momentum_at, staged_lr
from speedrun_lib.windows import stretched, stretched_scale

VOCAB, BIGRAM_ROWS = 500, 1024
RUNG = {82: "sparse_bigram"}
ORDER = ["lm_head", "embed", "value_embeds", "bigram_embed", "qk_bank", "vo_bank", "mlp_bank", "attn_gate_bank",
         "ve_gate_bank", "smear_gate", "skip_gate", "post_lambdas", "resid_lambdas", "x0_lambdas", "bigram_lambdas",
         "xsa_alphas", "scalars", "mudd_w1", "mudd_w2", "mudd_b2"]
MATRICES = dict.fromkeys(("lm_head", "embed", "value_embeds", "qk_bank", "vo_bank", "mlp_bank", "mudd_w1"), (0, 0.05))
GATES = dict.fromkeys(("attn_gate_bank", "ve_gate_bank", "smear_gate", "skip_gate", "mudd_w2"), (0, 0.5))
SCALES = MATRICES | GATES | {"bigram_embed": (0, 1), "scalars": (0.75, 0.25), "mudd_b2": (0, 2), "xsa_alphas": (0, 1)}
SIXTEENTHS = {"post_lambdas": 1, "resid_lambdas": 1, "x0_lambdas": 0, "bigram_lambdas": 0}  # base + round(16u)/64


def hashed(n: int, numbers: np.ndarray) -> np.ndarray:
    "32-bit hash of numbers in stream n."
    with np.errstate(over="ignore"):
        s = numbers.astype(np.uint32) * np.uint32(747796405) + np.uint32((2891336453 * n + 12345) % 2**32)
        w = ((s >> ((s >> np.uint32(28)) + np.uint32(4))) ^ s) * np.uint32(277803737)
    return (w >> np.uint32(22)) ^ w


def uniform(n: int, shape: tuple[int, ...], rows: list[int] | None = None) -> Tensor:
    "Hashed numbers in [-1, 1), fp64; of a larger tensor the named rows, or all."
    size = int(np.prod(shape[1:]))
    first = np.arange(shape[0]) if rows is None else np.array(rows, dtype=int)
    out, block = torch.empty(len(first), size, dtype=torch.float64), 1 + 2**17 // size
    for start in range(0, len(first), block):  # in pieces that stay in the cache
        numbers = first[start : start + block, None] * size + np.arange(size)
        out[start : start + block] = torch.from_numpy(hashed(n, numbers) / 2.0**31 - 1)
    return out.view(shape)


def tokens_of(n: int, count: int) -> Tensor:
    "Hashed token ids."
    return torch.from_numpy((hashed(n, np.arange(count)) % VOCAB).astype(np.int64))


def load(script: str | None) -> SimpleNamespace | ModuleType:
    "The definitions to test: the package's, or those of an exported script."
    if script is None:
        return SimpleNamespace(
            GPT=gpt.GPT, Optimizer=optimizer.Optimizer, SIZES=SIZES, initial_mudd_bias=initial_mudd_bias,
            joined=optimizer.joined, momentum_at=momentum_at, mtp_losses=mtp_losses, mtp_weights=mtp_weights,
            staged_lr=staged_lr, stretched=stretched, stretched_scale=stretched_scale)
    spec = importlib.util.spec_from_file_location("exported_script", Path(script).resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def network(code, record: int) -> nn.Module:
    "The record's network with a small vocabulary, in fp64."
    recipe = dataclasses.replace(recipe_for(RUNG[record], "full"), bigram_size=BIGRAM_ROWS, val_len=1024, seq_len=1024)
    return code.GPT(recipe, dataclasses.replace(code.SIZES["full"], vocab_size=VOCAB)).double()


@torch.no_grad()
def fill(model: nn.Module, offset: int = 0) -> None:
    "Fill every parameter from the hash."
    for n, name in enumerate(ORDER, start=1):
        p = model.get_parameter(name)
        u = uniform(n + offset, tuple(p.shape))
        if name in SIXTEENTHS:
            p.copy_(SIXTEENTHS[name] + torch.round(16 * u) / 64)
        else:
            base, amplitude = SCALES[name]
            p.copy_(u.mul_(amplitude).add_(base))


def stretch(code, model: nn.Module, transitions: str) -> None:
    "Follow the long window through `old:new,...` in blocks of 128 tokens; tables stay unrounded."
    frequencies, scale = model.frequencies, model.recipe.softmax_scale
    for pair in transitions.split(","):
        old, new = (128 * int(blocks) for blocks in pair.split(":"))
        frequencies, scale = code.stretched(frequencies, old, new), code.stretched_scale(scale, old, new)
    angles = torch.arange(len(model.rotary_cos), dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos().repeat_interleave(2, 1), angles.sin().repeat_interleave(2, 1)
    sin[:, 1::2] *= -1
    model.rotary_cos.copy_(cos)
    model.rotary_sin.copy_(sin)
    model.softmax_scale.fill_(scale)


def network_oracle(args: argparse.Namespace) -> dict:
    "Losses and gradient norms of one forward and backward."
    code = load(args.script)
    model = network(code, args.record)
    fill(model, args.fill_offset)
    if args.yarn:
        stretch(code, model, args.yarn)
    model.short.fill_(args.short)
    model.long.fill_(args.long)
    stream = tokens_of(args.token_stream, args.tokens + 1)[None]
    borders = torch.tensor([int(b) for b in args.documents.split(",")] + [args.tokens] * 4, dtype=torch.int32)
    z = model.logits(stream[:, :-1], borders, torch.tensor(args.tokens, dtype=torch.int32))[0]
    rows = nn.functional.cross_entropy(z.float(), stream[0, 1:], reduction="none")
    trained = code.mtp_losses(z[None], stream[:, 1:], torch.tensor([1, 0.5, 0.25], dtype=torch.float64))[0]
    nn.functional.cross_entropy(z, stream[0, 1:]).backward()
    return {
        "evaluation_mean": nn.functional.cross_entropy(z, stream[0, 1:]).item(),
        "evaluation_mean_fp32_rows": rows.double().mean().item(),
        "evaluation_rows": rows.tolist(),
        "training_sum": trained.sum().item(),
        "training_rows": trained.tolist(),
        "softmax_scale": float(model.softmax_scale),
        "gradient_norms": {name: model.get_parameter(name).grad.double().norm().item() for name in ORDER},
    }


CONFIG = {
    "record": 82, "gradients": "network", "T": 64, "documents": [0, 20, 50, 64], "scheduled": 9, "extension": 3,
    "momentum_warmup": 5, "momentum_cooldown": 4, "block_tokens": 4, "fill_number_offset": 0, "token_stream": 300,
    "eval_stream": 200, "lr_scale": 0.125, "down_scale": 0.25, "bigram_rows": BIGRAM_ROWS, "polar": "float64",
    "matrices": {},
}
TABLES = dict.fromkeys(("lm_head", "embed", "value_embeds"), (0, 0.02))
BANKS = dict.fromkeys(("qk_bank", "vo_bank", "mlp_bank", "mudd_w1"), (0, 1 / 32))
FACTORS = dict.fromkeys(("post_lambdas", "resid_lambdas"), (1, 1 / 16)) | {"x0_lambdas": (0, 1 / 16)}
STEP_SCALES = SCALES | TABLES | BANKS | FACTORS | {
    "bigram_embed": (0, 0.05), "bigram_lambdas": (0.05, 1 / 16), "xsa_alphas": (0, 0.5), "mudd_w2": (0, 0.1)}


def small_record(config: dict, code=None) -> nn.Module:
    "The record's network with a small vocabulary, filled mildly."
    code = code or load(None)
    recipe = dataclasses.replace(
        recipe_for(RUNG[config["record"]], "full"), bigram_size=config["bigram_rows"], val_len=1024, seq_len=1024,
        steps=config["scheduled"], extension=config["extension"], window_block=config["block_tokens"],
        adam_lr=0.008 * config["lr_scale"], muon_lr=0.023 * config["lr_scale"])
    model = code.GPT(recipe, dataclasses.replace(code.SIZES["full"], vocab_size=VOCAB))
    for name, rows in config["matrices"].items():
        setattr(model, name, nn.Parameter(model.get_parameter(name).detach()[rows]))
    with torch.no_grad():
        for n, name in enumerate(ORDER, start=1 + config["fill_number_offset"]):
            p = model.get_parameter(name)
            base, amplitude = STEP_SCALES.get(name, (0, 0))
            if name == "mudd_b2":
                base, amplitude = code.initial_mudd_bias().double(), 0.5
            value = uniform(n, tuple(p.shape), config["matrices"].get(name)).mul_(amplitude).add_(base)
            if name == "mlp_bank":
                value[1::2] *= config["down_scale"]
            p.copy_(value.float())
        model.embed.copy_(model.lm_head.T)
    return model


@contextlib.contextmanager
def polar_in(dtype: torch.dtype, place: ModuleType):
    "Let the optimizer of a module iterate Polar Express in another precision."
    usual = place.polar_express
    place.polar_express = lambda u, *_: polar_express(u.to(dtype)).to(u.dtype)
    try:
        yield
    finally:
        place.polar_express = usual


def network_gradients(model: nn.Module, step: int, config: dict, code=None) -> Tensor:
    "Add the gradients of the training loss, computed in fp64, to those that wait; returns the loss."
    code = code or load(None)
    wide = copy.deepcopy(model).double()
    wide.at_step(step)
    weights = torch.tensor(code.mtp_weights(step, config["scheduled"])).double()
    stream = tokens_of(config["token_stream"] + step, config["T"] + 1)[None]
    loss = code.mtp_losses(wide.logits(stream[:, :-1], *documents(config)), stream[:, 1:], weights).sum()
    loss.backward()
    add_gradients(model, {name: p.grad for name, p in wide.named_parameters() if p.grad is not None})
    return loss.detach()


def prescribed_gradients(model: nn.Module, step: int, config: dict) -> None:
    "Add hashed numbers to the gradients that wait; some rows get none."
    grads = {}
    for k, name in enumerate(ORDER, start=1):
        shape, rows = tuple(model.get_parameter(name).shape), config["matrices"].get(name)
        grads[name] = uniform(1000 + 100 * step + k, shape, rows) / 64
    grads["value_embeds"][::3] = 0
    grads["bigram_embed"][1::4] = 0
    for name, used in USED.items():
        numbers = config["matrices"].get(name, range(len(grads[name])))
        grads[name][[number >= used for number in numbers]] = 0  # they belong to no layer
    add_gradients(model, grads)


def add_gradients(model: nn.Module, grads: dict[str, Tensor]) -> None:
    "Accumulate in each parameter's own dtype."
    for name, grad in grads.items():
        p = model.get_parameter(name)
        grad = grad.float().to(p.dtype)
        p.grad = grad if p.grad is None else p.grad + grad


def documents(config: dict) -> tuple[Tensor, Tensor]:
    "Borders with some empty documents, and the longest length."
    borders = torch.tensor(config["documents"] + [config["T"]] * 4, dtype=torch.int32)
    return borders, torch.tensor(config["T"], dtype=torch.int32)


@torch.no_grad()
def evaluation(model: nn.Module, step: int, config: dict, long: int | None = None) -> float:
    "Mean loss of the next token in fp64."
    wide = copy.deepcopy(model).double()
    wide.at_step(step)
    if long:
        wide.long.fill_(long)
    stream = tokens_of(config["eval_stream"], config["T"] + 1)[None]
    z = wide.logits(stream[:, :-1], *documents(config))[0]
    return nn.functional.cross_entropy(z, stream[0, 1:]).item()


USED = {"qk_bank": 60, "vo_bank": 20, "mlp_bank": 22}  # matrices of a whole bank that belong to a layer


def followed(config: dict, name: str) -> list[int]:
    "Numbers of the matrices of a bank whose way is followed; those that only fill the bank up are left out."
    return [n for n, number in enumerate(config["matrices"].get(name, range(USED[name]))) if number < USED[name]]


def master(model: nn.Module, opt: torch.optim.Optimizer, name: str) -> Tensor:
    "A parameter in fp64, with the optimizer's low halves where there are any."
    p = model.get_parameter(name)
    low = opt.state[p].get("mantissa")
    return (p.detach() if low is None else optimizer.joined(p.detach(), low)).double()


def steps_oracle(config: dict, most: int | None = None, every=lambda step, model, opt: {}, script=None) -> dict:
    "Losses and distances from the start of a short run, or of its first steps; `every` adds to each step's row."
    code = load(script)
    model = small_record(config, code)
    opt = code.Optimizer(model.recipe, model)
    start = {name: model.get_parameter(name).detach().double() for name in ORDER}
    rates = [group["lr"] for group in opt.param_groups]
    total, out = config["scheduled"] + config["extension"], {"steps": []}
    with_network = config["gradients"] == "network"
    if with_network:
        out["evaluation_before"] = evaluation(model, 0, config)
    with polar_in(getattr(torch, config["polar"]), code if script else optimizer):
        for step in range(most or total):
            factor = code.staged_lr(step, config["scheduled"])
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate * factor
                group["momentum"] = code.momentum_at(
                    step, total, config["momentum_warmup"], config["momentum_cooldown"])
            opt.step_number = step
            if with_network:
                loss = network_gradients(model, step, config, code)
            else:
                loss = prescribed_gradients(model, step, config)
            norms = {} if step else {n: model.get_parameter(n).grad.double().norm().item() for n in ORDER}
            opt.step()
            row = {"step": step, "factor": factor, "loss": loss.item() if with_network else None}
            moved = {name: master(model, opt, name) - start[name] for name in ORDER}
            moved |= {name: moved[name][followed(config, name)] for name in USED}
            row["distances"] = {name: d.norm().item() for name, d in moved.items() if name != "mlp_bank"}
            layers = moved["mlp_bank"]
            row["distances"] |= {"mlp_up": layers[::2].norm().item(), "mlp_down": layers[1::2].norm().item()}
            out["steps"].append(row | ({"gradient_norms": norms} if norms else {}) | every(step, model, opt))
            print(json.dumps(row), file=sys.stderr, flush=True)
    if with_network and not most:
        final = {82: 20}[config["record"]] * config["block_tokens"]
        out["evaluation_after"] = evaluation(model, total, config, long=final)
    return out


def main() -> None:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=int, choices=list(RUNG), default=82)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--documents", default="0,20,50,64", help="where documents start, and the end")
    parser.add_argument("--short", type=int, default=8, help="short window, tokens")
    parser.add_argument("--long", type=int, default=24, help="long window, tokens")
    parser.add_argument("--fill-offset", type=int, default=0, help="added to the stream number of every parameter")
    parser.add_argument("--token-stream", type=int, default=200)
    parser.add_argument("--yarn", help="window transitions, e.g. 3:7,7:11 (blocks of 128 tokens)")
    parser.add_argument("--script", help="an exported script instead of the package")
    parser.add_argument("--steps", type=Path, metavar="CONFIG.json", help="a short training run instead of one pass")
    args = parser.parse_args()
    if args.steps:
        result = steps_oracle(CONFIG | json.loads(args.steps.read_text()), script=args.script)
    else:
        result = network_oracle(args)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
