"""Numbers of the record's network for any configuration, as JSON: compare them with the original's.

`python -m tests.oracle --record 82 --tokens 64 --documents 0,20,50,64 --short 8 --long 24` fills every parameter from a
hash, runs the network in fp64 on 64 hashed tokens, and prints losses and gradient norms.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from speedrun_lib.recipe import SIZES, recipe_for

VOCAB, BIGRAM_ROWS = 500, 1024
RUNG = {82: "bf16_weights"}
ORDER = ["lm_head", "embed", "value_embeds", "bigram_embed", "qk_bank", "vo_bank", "mlp_bank", "attn_gate_bank",
         "ve_gate_bank", "smear_gate", "skip_gate", "post_lambdas", "resid_lambdas", "x0_lambdas", "bigram_lambdas",
         "xsa_alphas", "scalars", "mudd_w1", "mudd_w2", "mudd_b2"]
MATRICES = dict.fromkeys(("lm_head", "embed", "value_embeds", "qk_bank", "vo_bank", "mlp_bank", "mudd_w1"), (0, 0.05))
GATES = dict.fromkeys(("attn_gate_bank", "ve_gate_bank", "smear_gate", "skip_gate", "mudd_w2"), (0, 0.5))
SCALES = MATRICES | GATES | {"bigram_embed": (0, 1), "scalars": (0.75, 0.25), "mudd_b2": (0, 2), "xsa_alphas": (0, 1)}
SIXTEENTHS = {"post_lambdas": 1, "resid_lambdas": 1, "x0_lambdas": 0, "bigram_lambdas": 0}  # base + round(16u)/64


def hashed(n: int, count: int) -> np.ndarray:
    "32-bit hash of the numbers 0..count-1 in stream n."
    with np.errstate(over="ignore"):
        s = np.arange(count, dtype=np.uint32) * np.uint32(747796405) + np.uint32((2891336453 * n + 12345) % 2**32)
        w = ((s >> ((s >> np.uint32(28)) + np.uint32(4))) ^ s) * np.uint32(277803737)
    return (w >> np.uint32(22)) ^ w


def uniform(n: int, shape: tuple[int, ...]) -> Tensor:
    "Hashed numbers in [-1, 1), fp64."
    return torch.from_numpy(hashed(n, int(np.prod(shape))) / 2.0**31 - 1).view(shape)


def tokens_of(n: int, count: int) -> Tensor:
    "Hashed token ids."
    return torch.from_numpy((hashed(n, count) % VOCAB).astype(np.int64))


def load(script: str | None) -> SimpleNamespace | ModuleType:
    "The definitions to test: the package's, or those of an exported script."
    if script is None:
        from speedrun_lib.gpt import GPT
        from speedrun_lib.mtp import mtp_losses
        from speedrun_lib.rotary import rotary_table
        from speedrun_lib.windows import stretched, stretched_scale

        return SimpleNamespace(GPT=GPT, mtp_losses=mtp_losses, rotary_table=rotary_table, stretched=stretched,
                               stretched_scale=stretched_scale)
    spec = importlib.util.spec_from_file_location("exported_script", Path(script).resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def network(code, record: int) -> nn.Module:
    "The record's network with a small vocabulary, in fp64."
    recipe = dataclasses.replace(recipe_for(RUNG[record], "full"), bigram_size=BIGRAM_ROWS, val_len=1024, seq_len=1024)
    size = dataclasses.replace(SIZES["full"], vocab_size=VOCAB)
    if not hasattr(code, "LADDER") and hasattr(code, "RECIPES"):
        size = dataclasses.replace(code.SIZES["full"], vocab_size=VOCAB)
    return code.GPT(recipe, size).double()


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
            p.copy_(base + amplitude * u)


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
    print(json.dumps(network_oracle(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
