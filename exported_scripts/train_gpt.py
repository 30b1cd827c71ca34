"""Train GPT-2 by all rungs of the ladder up to `fused_rotary`, which adds:
norm, rotation and offset of queries and keys in one kernel.

Rung `fused_rotary` of the NanoGPT speedrun course (an addition to record 82); chapter nbs/57_fused_rotary.ipynb.
Made by `speedrun export fused_rotary` from the course's notebooks: change those, not this file.

    torchrun --standalone --nproc_per_node=8 FILE        8 GPUs; 1, 2 and 4 work as well
    python FILE --size nano --data data/demo_bytes       a laptop CPU

Data: `speedrun data get fineweb --shards N` or `speedrun data get demo` (llm.c's .bin format).
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._functorch import config as functorch_config

# ---- 01_data -------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_BYTES = 256 * 4


class DataError(ValueError):
    "Training data are missing or wrong; the message says which file and what to do."


def read_header(
    path: Path,  # a `.bin` shard
) -> int:  # number of tokens in the shard
    "Check magic, version and size of a shard; raises `DataError` (format: llm.c)."
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4")
    if header[0] != SHARD_MAGIC:
        raise DataError(f"{path} is not a token shard (wrong magic number); delete it and download it again")
    if header[1] != SHARD_VERSION:
        raise DataError(f"{path} has shard version {header[1]}, this code reads version {SHARD_VERSION}; "
                        "download it again or convert it")
    expected = HEADER_BYTES + 2 * int(header[2])
    if size != expected:
        raise DataError(f"{path} should have {expected:,} bytes for its {header[2]:,} tokens but has {size:,}; "
                        "delete it and download it again")
    return int(header[2])


def read_shard(
    path: Path,  # a `.bin` shard
) -> np.ndarray:  # uint16 tokens, memory-mapped: nothing is read before it is used
    "Map the tokens of a shard after checking its header."
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(read_header(path),))


def find_shards(
    data_dir: Path,  # folder with shards named like fineweb_train_000001.bin
    split: str,  # "train" or "val"
) -> list[Path]:  # sorted by name, at least one
    "The shards of one split; raises `DataError` when there is none."
    files = sorted(data_dir.glob(f"*_{split}_*.bin"))
    if not files:
        raise DataError(f"no {split} shards ({data_dir}/*_{split}_*.bin); fetch some with `speedrun data get demo` or "
                        "`speedrun data get fineweb --shards 1`, or name another folder with --data")
    return files


class OutOfDocumentsError(Exception):
    "The shard has no further document start; the batch is abandoned and starts again on the next shard."


def pack_row(
    starts: np.ndarray,  # sorted positions of document-opening tokens in the shard
    size: int,  # tokens in the shard
    cursor: int,  # index into `starts` of the next unused document
    length: int,  # tokens to fill, targets included
    max_len: int,  # longest piece taken from one document
) -> tuple[list[tuple[int, int]], int]:  # pieces [start, end) on the tape, new cursor
    "Fill one row with the beginnings of documents (record 26; the cut at `max_len` is record 29)."
    pieces, filled = [], 0
    while filled < length:
        if cursor >= len(starts):
            raise OutOfDocumentsError
        start = int(starts[cursor])
        cursor += 1
        border = int(starts[cursor]) if cursor < len(starts) else size
        end = min(border, start + max_len, start + length - filled)
        pieces.append((start, end))
        filled += end - start
    return pieces, cursor


PARTS = 8  # micro-batches per step over all processes; 8 GPUs take one each


class TokenLoader:
    "Deterministic batches of (inputs, targets) from shards, the same for every number of processes."

    def __init__(
        self,
        files: list[Path],  # shards in reading order
        rows: int,  # rows per step over all processes, a multiple of 8
        row_len: int,  # tokens per row
        bos: int,  # token that opens a document
        aligned: bool,  # rows start at document starts (record 26) instead of anywhere
    ):
        self.files, self.rows, self.row_len = files, rows, row_len
        self.bos, self.aligned = bos, aligned
        self.max_len = row_len + 1  # a document may fill a row, its last target included
        if rows % PARTS:
            raise ValueError(f"{rows} rows per step cannot be dealt to {PARTS} parts; use a multiple of {PARTS}")
        self.open(shard=0, cursor=0)

    def open(self, shard: int, cursor: int) -> None:
        "Continue at document or token `cursor` of a shard."
        self.shard, self.cursor = shard % len(self.files), cursor
        self.tokens = read_shard(self.files[self.shard])
        if self.aligned:
            self.starts = np.flatnonzero(self.tokens == self.bos)

    def state(self) -> dict[str, int]:
        "Position of the next step: pass it to `open` to continue there."
        return {"shard": self.shard, "cursor": self.cursor}

    def pieces(self) -> list[list[tuple[int, int]]]:
        "Where each row of a step lies on the current shard; moves the cursor only when all rows are found."
        length, cursor, rows = self.row_len + 1, self.cursor, []
        for _ in range(self.rows):
            if self.aligned:
                row, cursor = pack_row(self.starts, len(self.tokens), cursor, length, self.max_len)
            elif cursor + length > len(self.tokens):
                raise OutOfDocumentsError
            else:
                row, cursor = [(cursor, cursor + length)], cursor + self.row_len
            rows.append(row)
        self.cursor = cursor
        return rows

    def batch(self, rows: list[list[tuple[int, int]]]) -> tuple[Tensor, ...]:
        "Inputs and targets of one part, int64 (rows, row_len)."
        block = [np.concatenate([self.tokens[start:end] for start, end in row]) for row in rows]
        block_bt = torch.from_numpy(np.stack(block).astype(np.int64))
        return block_bt[:, :-1].contiguous(), block_bt[:, 1:].contiguous()

    def next_step(
        self,
        parts: list[int],  # which of the eight parts to return
    ) -> list[tuple[Tensor, ...]]:  # per part what `batch` returns
        "The next batch; a shard that cannot fill it is left for the next one, the first one after the last."
        for _ in range(len(self.files) + 1):
            try:
                rows = self.pieces()
                break
            except OutOfDocumentsError:
                self.open(self.shard + 1, cursor=0)
        else:
            raise DataError(f"no shard of {self.files[0].parent} holds one batch of {self.rows} rows of "
                            f"{self.row_len} tokens; use a smaller batch or more data")
        size = self.rows // PARTS
        return [self.batch(rows[part * size:(part + 1) * size]) for part in parts]


# ---- 04_lean -------------------------------------------------------------------------------------

# b batch rows, t tokens per row, d model dim, h heads, k head dim
def rms_norm(
    x: Tensor,  # (..., d)
) -> Tensor:  # (..., d), each vector with root mean square one
    "Divide each vector by its root mean square; no learned gain, no mean subtracted."
    return F.rms_norm(x, (x.shape[-1],))


def split_heads(
    x_btd: Tensor,
    w: Tensor,  # (d, d), out x in, like every weight here
    num_heads: int,  # h; divides d
) -> Tensor:  # (b, t, h, k)
    "Queries, keys or values of all heads: one product, cut into heads."
    return F.linear(x_btd, w).unflatten(-1, (num_heads, -1))


# ---- 10_rotary -----------------------------------------------------------------------------------

def rotary_frequencies(
    head_dim: int,  # k; divisible by 4
    base: float,  # the slowest of the turning pairs moves 1/base radians per token
) -> Tensor:  # (k/2,) radians per token for each pair of dimensions, fp32
    "Frequencies from 1 down to 1/base for half of the pairs; the other half stands still (record 17, @YouJiacheng)."
    turning = (1 / base) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float32)
    return torch.cat([turning, torch.zeros_like(turning)])


def rotary_table(
    frequencies: Tensor,  # (k/2,) radians per token
    length: int,  # positions
) -> tuple[Tensor, Tensor]:  # cosine and signed sine, (length, k) in bf16
    "Cosine and sine of every angle, laid out for neighbouring dimensions; the second of a pair has a negative sine."
    # fp32 until the end: bf16 cannot tell position 1,000 from 1,001
    angles = torch.arange(length, dtype=torch.float32, device=frequencies.device)[:, None] * frequencies
    cos, sin = angles.cos().repeat_interleave(2, dim=1), angles.sin().repeat_interleave(2, dim=1)
    sin[:, 1::2] *= -1
    return cos.bfloat16(), sin.bfloat16()


# b batch rows, t tokens per row, h heads, k head dim
def rotate(
    x_bthk: Tensor,
    cos_tk: Tensor,
    sin_tk: Tensor,  # signed, from `rotary_table`
) -> Tensor:  # (b, t, h, k)
    "Turn each pair of neighbouring dimensions by its angle (Su et al. 2021, arXiv 2104.09864)."
    swapped = x_bthk.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    t = x_bthk.shape[-3]
    return cos_tk[:t, None].type_as(x_bthk) * x_bthk + sin_tk[:t, None].type_as(x_bthk) * swapped


# ---- 11_qk_norm ----------------------------------------------------------------------------------

# b batch rows, t tokens per row, h heads, k head dim
def norm_queries_keys(
    q_bthk: Tensor,
    k_bthk: Tensor,
) -> tuple[Tensor, Tensor]:  # (b, t, h, k) each, every vector of length sqrt(k)
    "Queries and keys of one length: a score is then softmax_scale * k * cosine (Henry et al. 2020; record 5)."
    return rms_norm(q_bthk), rms_norm(k_bthk)


# ---- 12_relu2 ------------------------------------------------------------------------------------

# b batch rows, t tokens per row, d model dim
def relu2_mlp(
    x_btd: Tensor,
    up_w: Tensor,  # (4d, d)
    down_w: Tensor,  # (4d, d), stored like `up_w`
) -> Tensor:  # (b, t, d)
    "Two matrices with a squared ReLU between them (So et al. 2021, arXiv 2109.08668; record 5)."
    return F.relu(F.linear(x_btd, up_w)).square() @ down_w


# ---- 13_init -------------------------------------------------------------------------------------

def padded(
    vocab_size: int,
    multiple: int = 128,
) -> int:
    "The next multiple: matrix products run faster on round sizes (record 5)."
    return -(-vocab_size // multiple) * multiple


def uniform_weights(
    *shape: int,  # (..., rows, columns)
) -> Tensor:
    "Uniform weights with standard deviation 0.5/sqrt(columns), from torch's global generator (record 64)."
    return (2 * torch.rand(shape) - 1) * 0.5 * math.sqrt(3 / shape[-1])


# ---- 14_logits -----------------------------------------------------------------------------------

def softcap(
    z: Tensor,  # (..., v) raw logits
) -> Tensor:  # (..., v) in (0, 23)
    "A shifted, scaled sigmoid: bounded, and most sensitive at z = -5 (record 54)."
    return 23 * torch.sigmoid((z + 5) / 7.5)


# ---- 20_muon -------------------------------------------------------------------------------------

def nesterov(
    buffer: Tensor,  # running mean of gradients, changed in place
    grad: Tensor,  # like buffer
    momentum: float | Tensor,  # decay of the mean, 0..1; a scalar
) -> Tensor:  # like buffer: the mean one step ahead
    "Momentum that looks one step ahead (Nesterov's form)."
    buffer += (1 - momentum) * (grad - buffer)
    return buffer + (1 - momentum) * (grad - buffer)


# ---- 21_polar ------------------------------------------------------------------------------------

POLAR_COEFFICIENTS = (  # a, b, c of iteration 1..5; chapter 21 derives them
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def plain_gram(
    x: Tensor,  # (n, r, c)
) -> Tensor:  # (n, s, s) with s the smaller of r and c
    "The products of the columns of a tall matrix, of the rows of any other."
    return x.mT @ x if x.shape[-2] > x.shape[-1] else x @ x.mT


def plain_quintic(
    gram: Tensor,  # (n, s, s)
    b: float,
    c: float,
) -> Tensor:  # (n, s, s)
    "What an odd quintic multiplies X by, beside its first coefficient."
    return b * gram + c * gram @ gram


def polar_express(
    u: Tensor,  # (n, r, c): a stack of matrices
    gram_of: Callable = plain_gram,
    quintic: Callable = plain_quintic,
) -> Tensor:  # (n, r, c), singular values near one (0.86..1.14)
    "Replace each matrix by a nearly orthogonal one with the same singular vectors (Amsel et al. 2025; record 38)."
    # bf16 is enough and fast on a GPU; on a CPU without bf16 instructions it would be slower than fp32
    x = u.bfloat16() if u.is_cuda else u
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    tall = x.shape[-2] > x.shape[-1]
    for a, b, c in POLAR_COEFFICIENTS:
        poly = quintic(gram_of(x), b, c)
        x = torch.baddbmm(x, *((x, poly) if tall else (poly, x)), beta=a)  # a * x + the product
    return x.to(u.dtype)


# ---- 22_normuon ----------------------------------------------------------------------------------

def equalise(
    update: Tensor,  # (n, r, c): orthogonalised matrices
    state: dict[str, Tensor],  # holds second_moment (n, r, 1) or (n, 1, c); filled at the first call
    beta2: float,  # decay of the second moment, 0..1
) -> Tensor:  # (n, r, c), each matrix with the norm it had
    "Divide each row (of a wide matrix: each column) by the running size of its updates (records 41 and 48)."
    axis = -1 if update.shape[-2] >= update.shape[-1] else -2
    mean_square = update.float().square().mean(axis, keepdim=True)
    if "second_moment" not in state:
        state["second_moment"] = torch.zeros_like(mean_square)
    state["second_moment"].lerp_(mean_square, 1 - beta2)
    scale = state["second_moment"].clamp_min(1e-10).rsqrt()
    before = mean_square.sum((-2, -1), keepdim=True).sqrt()  # the norm, up to a factor that cancels
    after = (mean_square * scale.square()).sum((-2, -1), keepdim=True).sqrt()
    return update * (scale * before / after.clamp_min(1e-10)).to(update.dtype)


# ---- 23_cautious ---------------------------------------------------------------------------------

def cautious_decay(
    p: Tensor,
    update: Tensor,  # like p; it will be subtracted
    strict: bool,  # must the update really move the weight? Adam: yes, Muon: no
) -> Tensor:  # like p: the weights that decay, zero elsewhere
    "The weights that the update moves towards zero (Chen et al. 2025; records 43 and 50)."
    product = update * p
    return torch.where(product > 0 if strict else product >= 0, p, 0)


# ---- 24_two_speeds -------------------------------------------------------------------------------

def split_step(
    steps: int,  # scheduled steps of the run
) -> int:  # the last step that head and embedding take together; odd, because Adam steps on odd ones
    "Two thirds of the run (record 53)."
    return round(2 * steps / 3) | 1


def transposed_state(
    state: dict[str, Tensor],  # of the head, (d, v)
) -> dict[str, Tensor]:  # of the embedding, (v, d)
    "Adam's state of the head for the embedding that leaves it, so that it goes on as if nothing had happened."
    copies = {key: value.T if value.dim() == 2 else value for key, value in state.items()}
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in copies.items()}


SKIP_FROM, SKIP_TO = 3, 6  # the output of layer 3 enters again at layer 6, which has no attention


# ---- 30_streams ----------------------------------------------------------------------------------

LATE_FROM = 7  # attention of later layers reads the output of this one
GATE_DIMS = 12  # dimensions of the stream that a gate reads (record 28)


def initial_scalars(
    num_layers: int,  # l
) -> Tensor:  # (2l + 2,) fp32
    "Two factors per layer, on the matrices of attention's inputs and output; then the strengths of smear and skip."
    return torch.cat([torch.tensor([0.5, 1.0]).repeat(num_layers), torch.tensor([0.0, -1.5])])


# b batch rows, t tokens per row, d model dim
def skip_strength(
    x0_btd: Tensor,  # normed embeddings
    gate_w: Tensor,  # (1, 12)
    strength: Tensor,  # scalar; 2 * sigmoid(strength) is the largest gate
) -> Tensor:  # (b, t, 1)
    "How much of an early layer's output a token takes back in (records 11, 45, 55)."
    return 2 * torch.sigmoid(strength) * torch.sigmoid(F.linear(x0_btd[..., : gate_w.shape[-1]], gate_w))


# ---- 31_value_embeds -----------------------------------------------------------------------------

VALUE_LAYERS = (1, 2, 8, 9, 10)  # layers whose values get a table of their own (records 63 and 70)


# b batch rows, t tokens per row, d model dim, h heads, k head dim, v vocab
def value_rows(
    tables: Tensor,  # (5v, d): five tables below each other
    tokens_bt: Tensor,
) -> Tensor:  # (5, b, t, d)
    "The rows of all value tables for each token, in one gather (record 65)."
    return tables.view(len(VALUE_LAYERS), -1, tables.shape[-1])[:, tokens_bt]


def gated_values(
    ve_btd: Tensor,  # rows of a value table
    x_btd: Tensor,  # normed input of the attention
    gate_w: Tensor,  # (h, 12): six weights for the input, six for the row
) -> Tensor:  # (b, t, h, k)
    "Rows of a value table times a gate in (0, 2) for each head that reads six dimensions of both (records 55, 70)."
    read = torch.cat([x_btd[..., :6], ve_btd[..., :6]], dim=-1)
    gate = 2 * torch.sigmoid(F.linear(read, gate_w))
    return gate.unsqueeze(-1) * ve_btd.unflatten(-1, (len(gate_w), -1))


# ---- 32_smear_and_gate ---------------------------------------------------------------------------

# b batch rows, t tokens per row, d model dim, h heads, k head dim
def smear(
    x_btd: Tensor,  # embeddings
    gate_w: Tensor,  # (1, 12)
    strength: Tensor,  # scalar
) -> Tensor:  # (b, t, d)
    "Add a gated share of the previous token's embedding to each but the first (record 34)."
    gate = strength * torch.sigmoid(F.linear(x_btd[:, 1:, : gate_w.shape[-1]], gate_w))
    return torch.cat([x_btd[:, :1], x_btd[:, 1:] + gate * x_btd[:, :-1]], dim=1)


def gated_heads(
    y_bthk: Tensor,  # what attention gathered
    x_btd: Tensor,  # normed input of the attention
    gate_w: Tensor,  # (h, 12)
) -> Tensor:  # (b, t, h, k)
    "Each head's output times a gate in (0, 1) that reads twelve dimensions of the input (record 28)."
    return y_bthk * torch.sigmoid(F.linear(x_btd[..., : gate_w.shape[-1]], gate_w)).unsqueeze(-1)


# ---- 33_bigram -----------------------------------------------------------------------------------

# b batch rows, t tokens per row
def bigram_rows(
    tokens_bt: Tensor,  # token ids, any integer type
    rows: int,  # rows of the table; the last one is reserved for the first token of a batch row
) -> Tensor:  # (b, t) int32, 0..rows-1
    "The table row of each pair (previous token, token), by a hash in wrapping 32-bit arithmetic (record 62)."
    tokens = tokens_bt.int()
    reserved = torch.full_like(tokens[:, :1], rows - 1)
    # as in the record, the second token hashes with the reserved number instead of the first token
    previous = torch.cat([reserved, tokens[:, 1:-1]], dim=1)
    hashed = ((36313 * tokens[:, 1:]) ^ (27191 * previous)) % (rows - 1)
    return torch.cat([reserved, hashed], dim=1)


# ---- 34_mtp --------------------------------------------------------------------------------------

def stage_bounds(
    steps: int,  # scheduled steps
) -> tuple[int, int, int]:  # first step of the second and third stage, and the end
    "A run has three stages of equal length; what changes during training changes there (record 65)."
    return round(steps / 3), round(2 * steps / 3), steps


def stage_at(
    step: int,
    steps: int,  # scheduled steps
) -> tuple[int, float]:  # stage 0..2, or 3 after the scheduled steps; share of the stage that is done
    "The stage of a step."
    bounds = 0, *stage_bounds(steps)
    for stage in range(3):
        if step < bounds[stage + 1]:
            return stage, (step - bounds[stage]) / (bounds[stage + 1] - bounds[stage])
    return 3, 0.0


def mtp_weights(
    step: int,
    steps: int,  # scheduled steps
) -> list[float]:  # weights of the next token, the one after it, ...
    "Three targets, then two, then one: the weight of the farthest fades to zero within its stage (record 53)."
    stage, done = stage_at(step, steps)
    return [[1.0, 0.5, 0.25 * (1 - done)], [1.0, 0.5 * (1 - done)], [1.0], [1.0]][stage]


# b batch rows, t tokens per row, v vocab, n targets per position
def mtp_losses(
    z_btv: Tensor,  # logits
    targets_bt: Tensor,  # the next token of each position
    weights: Tensor,  # (n,)
) -> Tensor:  # (b, t)
    "Weighted cross-entropy of the next n tokens, all predicted by the same logits; targets past the row drop out."
    lse, losses = z_btv.logsumexp(-1), 0
    for shift, weight in enumerate(weights.unbind()):
        target = z_btv.gather(-1, targets_bt.roll(-shift, 1).unsqueeze(-1)).squeeze(-1)
        inside = torch.arange(targets_bt.shape[1], device=z_btv.device) < targets_bt.shape[1] - shift
        # the record's kernel pushes all logits down by the full weight, also where a target dropped out
        losses = losses + torch.where(inside, lse - target, lse - lse.detach()) * weight
    return losses


MUDD_DIM, MUDD_OUTPUTS, MUDD_SCALE = 64, 14, 0.1  # hidden width; most outputs; factor on them


# ---- 35_mudd -------------------------------------------------------------------------------------

# b batch rows, t tokens per row, d model dim, m hidden width, n coefficients
def mudd_coefficients(
    x_btd: Tensor,  # stream, not normed
    w1: Tensor,  # (m, d)
    w2: Tensor,  # (n, m)
    bias: Tensor,  # (n,)
) -> tuple[Tensor, ...]:  # n coefficients (b, t, 1)
    "Weights of connections, computed from the stream for every token (Xiao et al. 2025, arXiv 2502.12170; record 81)."
    return ((F.linear(F.gelu(F.linear(x_btd, w1)), w2) + bias) * MUDD_SCALE).split(1, dim=-1)


def last_layer_inputs(
    m: tuple[Tensor, ...],  # coefficients (b, t, 1); the first eight are used
    x_btd: Tensor,  # stream before the last layer
    start_btd: Tensor,  # stream before the first layer
    late_btd: Tensor,  # output of layer 7
    ve_btd: Tensor,  # rows of the last value table
    num_heads: int,  # h
) -> tuple[Tensor, Tensor]:  # addition to the values (b, t, h, k), stream (b, t, d)
    "Values from three states of the stream and the gated table; then the stream itself, recombined (record 81)."
    mixed = m[0] * start_btd + m[1] * late_btd + m[2] * x_btd
    gate = torch.cat(m[6:8], dim=-1).repeat_interleave(num_heads // 2, dim=-1).unsqueeze(-1)
    values = gate * ve_btd.unflatten(-1, (num_heads, -1)) + mixed.unflatten(-1, (num_heads, -1))
    return values, (1 + m[5]) * x_btd + m[3] * start_btd + m[4] * late_btd


def initial_mudd_bias() -> Tensor:  # (2, 14), before the factor 0.1
    "Biases that start near the network without MUDD: static factors, half a backout, but value gates of two, not one."
    start = torch.zeros(2, MUDD_OUTPUTS)
    start[0, 6:14] = torch.tensor([2.0, 2.0, 1.1**0.5, 1.0, 0.0, 0.05, 1.1**0.5, 1.0])
    start[1, 1] = -0.5
    return start / MUDD_SCALE


# ---- 36_xsa --------------------------------------------------------------------------------------

XSA_LAYERS = (1, 3, 4, 7, 8, 10)  # attention layers whose heads are not paired


# b batch rows, t tokens per row, h heads, k head dim
def exclude_self(
    y_bthk: Tensor,  # what attention gathered
    v_bthk: Tensor,  # values of the same tokens
    alpha_h: Tensor,  # (h,) learned; tanh(alpha) of the own part is removed
) -> Tensor:  # (b, t, h, k)
    "Remove a learned share of what points along the token's own value (Zhai 2026, arXiv 2603.09078; record 82)."
    own = F.normalize(v_bthk, dim=-1, eps=1e-4)
    share = torch.tanh(alpha_h).type_as(y_bthk).view(-1, 1)
    return y_bthk - share * (y_bthk * own).sum(-1, keepdim=True) * own


# ---- 40_documents --------------------------------------------------------------------------------

def document_slots(
    tokens: int,  # of one part
) -> int:  # multiple of 16; more documents than that never occurred in FineWeb
    "Room for document borders, fixed for each length so that nothing recompiles (record 78)."
    return {16_384: 64, 32_768: 96, 49_152: 128}.get(tokens) or -(-(tokens // 300) // 128) * 128


def cumulative_lengths(
    starts: Tensor,  # positions at which a document starts, rising, without position 0
    tokens: int,  # of the part
    slots: int,  # length of the result
) -> Tensor:  # (slots,) int32: 0, the starts, then `tokens` for documents of length zero
    "Borders of the documents packed into one part, as variable-length attention wants them (record 29)."
    borders = torch.full((slots,), tokens, dtype=torch.int32)
    borders[0] = 0
    borders[1 : len(starts) + 1] = starts
    return borders


# t tokens, h heads, k head dim, n documents
def dense_weights(
    q_thk: Tensor,
    k_thk: Tensor,
    cu_seqlens: Tensor,  # (n + 1,) int32
    window: int,  # a query sees itself and that many tokens before it
    softmax_scale: float,
) -> Tensor:  # (h, t, t)
    "Attention weights inside documents and a causal window, written as one masked softmax over all pairs."
    position = torch.arange(len(q_thk), device=q_thk.device)
    document = torch.searchsorted(cu_seqlens.to(position.device), position, right=True)
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance <= window) & (document[:, None] == document)
    scores = torch.einsum("qhk,thk->hqt", q_thk, k_thk) * softmax_scale
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def each_document(cu_seqlens: Tensor) -> Iterator[slice]:
    "Where the documents lie that have a token."
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        if start < end:
            yield slice(start, end)


def reference_forward(q_thk, k_thk, v_thk, cu_seqlens, max_len, window, softmax_scale):
    "Plain attention, one document after the other; any device and precision."
    out_thk = torch.empty_like(v_thk)
    for part in each_document(cu_seqlens):
        alone = cu_seqlens.new_tensor([0, part.stop - part.start])
        weights_hqt = dense_weights(q_thk[part], k_thk[part], alone, window, softmax_scale)
        out_thk[part] = torch.einsum("hqt,thk->qhk", weights_hqt, v_thk[part])
    return out_thk, q_thk.new_zeros(q_thk.shape[1::-1], dtype=torch.float32)


def reference_backward(grad_thk, q_thk, k_thk, v_thk, out_thk, lse_ht, cu_seqlens, max_len, window, softmax_scale):
    "Gradients of `reference_forward`, from weights computed once more."
    grads = torch.empty_like(q_thk), torch.empty_like(k_thk), torch.empty_like(v_thk)
    for part in each_document(cu_seqlens):
        alone, grad = cu_seqlens.new_tensor([0, part.stop - part.start]), grad_thk[part]
        weights_hqt = dense_weights(q_thk[part], k_thk[part], alone, window, softmax_scale)
        d_weights = torch.einsum("qhk,thk->hqt", grad, v_thk[part])
        d_scores = weights_hqt * (d_weights - (weights_hqt * d_weights).sum(-1, keepdim=True)) * softmax_scale
        grads[0][part] = torch.einsum("hqt,thk->qhk", d_scores, k_thk[part])
        grads[1][part] = torch.einsum("hqt,qhk->thk", d_scores, q_thk[part])
        grads[2][part] = torch.einsum("hqt,qhk->thk", weights_hqt, grad)
    return grads


def fa2_forward(q_thk, k_thk, v_thk, cu_seqlens, max_len, window, softmax_scale):
    "FlashAttention-2 as it comes with PyTorch."
    return torch.ops.aten._flash_attention_forward(
        q_thk, k_thk, v_thk, cu_seqlens, cu_seqlens, max_len, max_len, 0.0, False, False,
        scale=softmax_scale, window_size_left=window, window_size_right=0)[:2]


def fa2_backward(grad_thk, q_thk, k_thk, v_thk, out_thk, lse_ht, cu_seqlens, max_len, window, softmax_scale):
    "Gradients of `fa2_forward`."
    unused = torch.zeros(2, dtype=torch.uint64, device=q_thk.device), torch.empty(0, device=q_thk.device)
    return torch.ops.aten._flash_attention_backward(
        grad_thk, q_thk, k_thk, v_thk, out_thk, lse_ht, cu_seqlens, cu_seqlens, max_len, max_len, 0.0, False, *unused,
        scale=softmax_scale, window_size_left=window, window_size_right=0)


@functools.cache
def fa3_module() -> ModuleType:
    "FlashAttention-3: a package on this machine, else a build from the `kernels` hub, fetched only when asked for."
    try:
        return importlib.import_module("flash_attn_interface")
    except ImportError:
        kernels, hub = importlib.import_module("kernels"), importlib.import_module("huggingface_hub.constants")
        cached = any(Path(hub.HF_HUB_CACHE).glob("*--kernels-community--flash-attn3"))
        if not cached and os.environ.get("SPEEDRUN_ATTENTION") != "fa3":
            raise
        found = kernels.get_kernel("kernels-community/flash-attn3", version=1)
        return getattr(found, "flash_attn_interface", found)


def fa3_forward(q_thk, k_thk, v_thk, cu_seqlens, max_len, window, softmax_scale):
    "FlashAttention-3 (Hopper)."
    return fa3_module()._flash_attn_forward(
        q_thk, k_thk, v_thk, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_len,
        max_seqlen_k=max_len, softmax_scale=softmax_scale, causal=True, window_size_left=window,
        window_size_right=0)[:2]


def fa3_backward(grad_thk, q_thk, k_thk, v_thk, out_thk, lse_ht, cu_seqlens, max_len, window, softmax_scale):
    "Gradients of `fa3_forward`."
    grads = torch.empty_like(q_thk), torch.empty_like(k_thk), torch.empty_like(v_thk)
    fa3_module()._flash_attn_backward(
        grad_thk, q_thk, k_thk, v_thk, out_thk, lse_ht, cu_seqlens, cu_seqlens, None, None, max_len, max_len, *grads,
        softmax_scale, True, window, 0)
    return grads


@functools.cache
def fa4_module() -> ModuleType:
    "FlashAttention-4 from the wheel `flash-attn-4`; its inner functions are called, so the version is pinned."
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # it compiles once, not in every process
    return importlib.import_module("flash_attn.cute.interface")


def fa4_forward(q_thk, k_thk, v_thk, cu_seqlens, max_len, window, softmax_scale):
    "FlashAttention-4 (Hopper and Blackwell)."
    return fa4_module()._flash_attn_fwd(
        q_thk, k_thk, v_thk, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_len,
        max_seqlen_k=max_len, softmax_scale=softmax_scale, window_size_left=window, window_size_right=0,
        return_lse=True)[:2]


def fa4_backward(grad_thk, q_thk, k_thk, v_thk, out_thk, lse_ht, cu_seqlens, max_len, window, softmax_scale):
    "Gradients of `fa4_forward`."
    return fa4_module()._flash_attn_bwd(
        q_thk, k_thk, v_thk, out_thk, grad_thk, lse_ht, softmax_scale, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_len, max_seqlen_k=max_len, window_size_left=window, window_size_right=0)[:3]


def key_blocks(
    cu_seqlens: Tensor,
    window: Tensor,  # scalar on the same device
    tokens: int,
    block: int = 128,  # rows and columns of a block
) -> tuple[Tensor, Tensor]:  # (n,) blocks of keys for each block of queries; (n, n) their numbers, used ones first
    "Blocks of the mask that are not empty; they lie side by side and end at the diagonal."
    position = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, position, right=True) - 1
    first = torch.maximum(cu_seqlens[document], position - window)  # key that a query sees; it never falls
    number, low = position[: -(-tokens // block)], first[::block] // block
    return (number - low + 1).int(), ((low[:, None] + number) % len(number)).int()


def flex_varlen(
    q_thk: Tensor, k_thk: Tensor, v_thk: Tensor, cu_seqlens: Tensor, window: Tensor, softmax_scale: Tensor,
) -> Tensor:  # (t, h, k)
    "The same attention for PyTorch's compiler, which writes a kernel for this mask, and one for the gradients."
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    t, device = len(q_thk), q_thk.device
    window, softmax_scale = window.to(device), softmax_scale.to(device)
    document = torch.searchsorted(cu_seqlens, torch.arange(t, device=device), right=True)

    def seen(b, h, i, j):
        return (j <= i) & (i - j <= window) & (document[i] == document[j])

    counts, keys = key_blocks(cu_seqlens, window, t)
    mask = BlockMask.from_kv_blocks(counts[None, None], keys[None, None], BLOCK_SIZE=128, mask_mod=seen,
                                    seq_lengths=(t, t))
    q, k, v = (x.transpose(0, 1)[None] for x in (q_thk, k_thk, v_thk))
    out = flex_attention(q, k, v, score_mod=lambda score, *_: score * softmax_scale, block_mask=mask, scale=1.0)
    return out[0].transpose(0, 1).contiguous()


@functools.cache
def compiled_flex():
    "`flex_varlen` for networks that are not compiled."
    return torch.compile(flex_varlen, dynamic=False)


ATTENTION = (  # name, compute capability from (included) and to (excluded), kernels with their gradients; best first
    ("fa3", (9, 0), (10, 0), (fa3_forward, fa3_backward)),
    ("fa4", (9, 0), (12, 0), (fa4_forward, fa4_backward)),
    ("fa2", (8, 0), (99, 0), (fa2_forward, fa2_backward)),
    ("flex", (7, 0), (99, 0), None),  # no operator of its own: the compiler has to see it
    ("reference", (0, 0), (99, 0), (reference_forward, reference_backward)),
)


def choose_attention(
    capability: tuple[int, int],  # of the GPU; (0, 0) for a CPU
    available: Collection[str],  # backends that are installed and take the numbers' precision
    wish: str | None = None,  # name of a backend
) -> str:  # name of a backend
    "The best backend that runs, or the one wished for; raises `ValueError` when that one is unknown or cannot run."
    able = [name for name, low, high, _ in ATTENTION if low <= capability < high]
    usable = [name for name in able if name in available]
    if not wish:
        return usable[0]
    if wish in usable:
        return wish
    place = "compute capability {}.{}".format(*capability) if capability[0] else "a CPU"
    if all(wish != name for name, *_ in ATTENTION):
        reason = "is not the name of an attention backend"
    elif wish not in able:
        reason = f"does not run on {place}"
    else:
        reason = "is not installed, or does not take numbers of this precision"
    raise ValueError(f"SPEEDRUN_ATTENTION={wish} {reason}; on {place} use one of: {', '.join(usable)}")


def available_attention(
    dtype: torch.dtype,  # of queries, keys and values
) -> set[str]:
    "Backends whose code is on this machine and that take the precision."
    found = {"reference"} if dtype == torch.float64 else {"reference", "flex"}
    if dtype in (torch.float16, torch.bfloat16):
        found.add("fa2")
        for name, module in (("fa3", fa3_module), ("fa4", fa4_module)):
            try:
                module()
                found.add(name)
            except ImportError:
                pass
    return found


@functools.cache
def attention_backend(
    device: str,  # type of the device
    dtype: torch.dtype,  # of queries, keys and values
) -> str:  # name of a backend
    "The backend for this machine, chosen and said once; SPEEDRUN_ATTENTION overrides the choice."
    wish = os.environ.get("SPEEDRUN_ATTENTION")
    if device != "cuda":
        return choose_attention((0, 0), {"reference"}, wish)
    name = choose_attention(torch.cuda.get_device_capability(), available_attention(dtype), wish)
    if os.environ.get("RANK", "0") == "0":
        print(f"attention on {torch.cuda.get_device_name()}, {str(dtype)[6:]}: {name}", flush=True)
    return name


@torch.compiler.assume_constant_result
def uses_flex(device: str, dtype: torch.dtype) -> bool:
    "Whether the compiler writes the kernel; it asks this while it reads the network."
    return attention_backend(device, dtype) == "flex"


@torch.library.custom_op("speedrun_script::varlen_attention", mutates_args=())
def varlen_attention_op(
    q_thk: Tensor, k_thk: Tensor, v_thk: Tensor, cu_seqlens: Tensor, max_seqlen: Tensor, window: Tensor,
    softmax_scale: Tensor, rows: int,
) -> tuple[Tensor, Tensor]:  # (t, h, k); logarithms of the softmax's denominators (h, t), for backends that keep them
    "One operator for the compiler; the run-time scalars are read inside, so that they never become part of the graph."
    forward, _ = attention_kernels(q_thk)
    out_thk, lse_ht = forward(
        q_thk, k_thk, v_thk, cu_seqlens, rows * int(max_seqlen), int(window), float(softmax_scale))
    return out_thk.contiguous(), lse_ht


def attention_kernels(q_thk: Tensor):
    "Forward and backward function of the backend for a tensor."
    name = attention_backend(q_thk.device.type, q_thk.dtype)
    return next(kernels for other, *_, kernels in ATTENTION if other == name)


@varlen_attention_op.register_fake
def varlen_attention_shapes(q_thk, k_thk, v_thk, cu_seqlens, max_seqlen, window, softmax_scale, rows):
    t, h, _ = q_thk.shape
    return q_thk.new_empty(q_thk.shape), q_thk.new_empty((h, t), dtype=torch.float32)


@torch.library.custom_op("speedrun_script::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    grad_thk: Tensor, q_thk: Tensor, k_thk: Tensor, v_thk: Tensor, out_thk: Tensor, lse_ht: Tensor, cu_seqlens: Tensor,
    max_seqlen: Tensor, window: Tensor, softmax_scale: Tensor, rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of q, k, v
    "Gradients of `varlen_attention_op`."
    _, backward = attention_kernels(q_thk)
    grads = backward(grad_thk.contiguous(), q_thk, k_thk, v_thk, out_thk, lse_ht, cu_seqlens,
                     rows * int(max_seqlen), int(window), float(softmax_scale))
    return tuple(x.contiguous() for x in grads)


@varlen_attention_backward.register_fake
def varlen_gradient_shapes(grad_thk, q_thk, k_thk, v_thk, *_):
    return q_thk.new_empty(q_thk.shape), k_thk.new_empty(k_thk.shape), v_thk.new_empty(v_thk.shape)


class VarlenAttention(torch.autograd.Function):
    "The operator and its gradient; traced with the network, so that the compiler's cache on disk notices changes."

    @staticmethod
    def forward(ctx, *inputs) -> Tensor:
        out_thk, lse_ht = varlen_attention_op(*inputs)
        q_thk, k_thk, v_thk, *rest, ctx.rows = inputs
        ctx.save_for_backward(q_thk, k_thk, v_thk, out_thk, lse_ht, *rest)
        return out_thk

    @staticmethod
    def backward(ctx, grad_thk: Tensor) -> tuple[Tensor | None, ...]:
        return *varlen_attention_backward(grad_thk, *ctx.saved_tensors, ctx.rows), None, None, None, None, None


def varlen_attention(
    q_thk: Tensor,
    k_thk: Tensor,
    v_thk: Tensor,
    cu_seqlens: Tensor,  # (n + 1,) int32: where documents start, and the end, in tokens
    max_seqlen: Tensor,  # scalar int32 on the CPU: length of the longest document in tokens, or more
    window: Tensor,  # scalar int32 on the CPU: a query sees itself and that many rows before it
    softmax_scale: Tensor,  # scalar fp32 on the CPU
    rows: int = 1,  # rows of q, k and v for each token
) -> Tensor:  # (t, h, k)
    "Causal attention inside each document and a window."
    device = q_thk.device.type
    if device == "cuda" and torch.is_autocast_enabled(device):
        q_thk, k_thk, v_thk = (x.to(torch.get_autocast_dtype(device)) for x in (q_thk, k_thk, v_thk))
    if rows > 1:
        cu_seqlens = rows * cu_seqlens
    if not uses_flex(device, q_thk.dtype):
        return VarlenAttention.apply(q_thk, k_thk, v_thk, cu_seqlens, max_seqlen, window, softmax_scale, rows)
    flex = flex_varlen if torch.compiler.is_compiling() else compiled_flex()
    return flex(q_thk, k_thk, v_thk, cu_seqlens, window, softmax_scale)


def document_starts(
    tokens: np.ndarray,
    bos: int,  # token that opens a document
) -> np.ndarray:  # rising positions
    "Where documents start; in the demo text a document is a speech, since scenes are longer than a row of size nano."
    opens = tokens == bos
    if bos == 256:
        opens[2:] |= (tokens[:-2] == 10) & (tokens[1:-1] == 10) & (tokens[2:] != 10)
    return np.flatnonzero(opens)


class DocumentLoader(TokenLoader):
    "Batches of packed documents with their borders; the parts of a step are rows of their own."

    def __init__(
        self,
        files: list[Path],  # shards in reading order
        row_len: int,  # tokens per part
        max_len: int,  # longest piece of a document
        bos: int,  # token that opens a document
        aligned: bool,  # pack the beginnings of documents (training), or cut the tape anywhere (validation)
    ):
        self.loaded: dict[int, Future] = {}  # shard -> its tokens and where its documents start
        self.pool = ThreadPoolExecutor(1)
        super().__init__(files, PARTS, row_len, bos, aligned)
        self.max_len = max_len

    def load(self, shard: int) -> tuple[np.ndarray, np.ndarray | None]:
        "Map a shard, and find its documents if rows start there."
        tokens = read_shard(self.files[shard])
        return tokens, document_starts(tokens, self.bos) if self.aligned else None

    def open(self, shard: int, cursor: int) -> None:
        "Continue at document or token `cursor` of a shard; the shard after it is loaded by a thread (record 33)."
        wanted = dict.fromkeys(n % len(self.files) for n in (shard, shard + 1))
        self.loaded = {n: self.loaded.get(n) or self.pool.submit(self.load, n) for n in wanted}
        shard %= len(self.files)
        self.tokens, self.starts = self.loaded[shard].result()
        self.shard, self.cursor = shard, cursor

    def batch(self, rows: list[list[tuple[int, int]]]) -> tuple[Tensor, ...]:
        "Inputs and targets of a part, int64 (1, row_len); borders of its documents; length of the longest, at most."
        (row,) = rows
        if self.aligned:
            starts = np.cumsum([end - start for start, end in row])[:-1]
        else:
            first, end = row[0]
            before = min(first, 2)  # the demo's rule looks two tokens back
            starts = document_starts(self.tokens[first - before : end - 1], self.bos) - before
            starts = starts[starts >= 0]
        needed, slots = len(starts) + 2, document_slots(self.row_len)  # zero, the starts, the end
        if slots < needed:  # a power of two: few different lengths, so that little compiles again
            slots = 1 << (needed - 1).bit_length()
        borders = cumulative_lengths(torch.from_numpy(starts), self.row_len, slots)
        return *super().batch(rows), borders, torch.tensor(self.max_len, dtype=torch.int32)


class Prefetcher:
    "A loader that prepares the next step on a thread while the present one runs (record 33)."

    def __init__(
        self,
        loader: TokenLoader,  # used by the thread alone from now on
        device: torch.device,  # for a GPU the batches are put into pinned memory
    ):
        self.loader, self.device, self.position = loader, device, loader.state()
        self.row_len, self.max_len = loader.row_len, loader.max_len  # a change takes effect in the next step
        self.pool, self.asked, self.job = ThreadPoolExecutor(1), None, None
        self.waited_s = 0.0  # time that `next_step` has waited for the thread

    def state(self) -> dict[str, int]:
        "Position of the next step that `next_step` has not returned, however far the thread is."
        return self.position

    def open(self, shard: int, cursor: int) -> None:
        "Continue at document or token `cursor` of a shard."
        self.position, self.asked = {"shard": shard, "cursor": cursor}, None

    def next_step(
        self,
        parts: list[int],  # which of the eight parts to return
    ) -> list[tuple[Tensor, ...]]:  # per part what the loader's `batch` returns
        "The next batch; a step that was prepared for other sizes is dropped and packed again."
        wanted, start = (parts, self.row_len, self.max_len), time.perf_counter()
        if wanted != self.asked:
            self.prepare(wanted)
        batches, self.position = self.job.result()
        self.prepare(wanted)
        self.waited_s += time.perf_counter() - start
        return batches

    def prepare(self, wanted: tuple[list[int], int, int]) -> None:
        "Let the thread prepare the step at the present position."
        self.asked, self.job = wanted, self.pool.submit(self.work, self.position, *wanted)

    def work(self, position: dict[str, int], parts: list[int], row_len: int, max_len: int) -> tuple[list, dict]:
        "A step and the position after it; runs on the thread."
        if self.loader.state() != position:
            self.loader.open(**position)
        self.loader.row_len, self.loader.max_len = row_len, max_len
        batches = self.loader.next_step(parts)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                batches = [tuple(x.pin_memory() if x.dim() else x for x in batch) for batch in batches]
        return batches, self.loader.state()


# ---- 41_windows ----------------------------------------------------------------------------------

LONG_LAYERS = (3, 10)  # layers with the long window
WINDOWS = ((1, 3), (3, 7), (5, 11), (6, 13))  # short and long, in blocks, by stage; the last after the scheduled steps
FINAL_LONG = 20  # blocks, for the last validation


def stage_windows(
    step: int,
    steps: int,  # scheduled steps
    block: int,  # tokens
) -> list[tuple[int, int]]:  # short and long windows in tokens, of every stage up to the present one
    "The windows of a step, and those before them."
    return [(short * block, long * block) for short, long in WINDOWS[: stage_at(step, steps)[0] + 1]]


def stretched(
    frequencies: Tensor,  # radians per token
    old: int,  # longest distance so far, in tokens
    new: int,  # longest distance from now on
) -> Tensor:  # like frequencies
    "Frequencies for a longer window: slow ones are slowed down, fast ones stay (YaRN; Peng et al. 2023; record 31)."
    turns = old * frequencies / (2 * torch.pi)
    keep = ((turns - 1) / (32 - 1)).clamp(0, 1)
    return frequencies * (old / new + keep * (1 - old / new))


def stretched_scale(
    softmax_scale: float,  # factor on the scores so far
    old: int,  # longest distance so far, in tokens
    new: int,  # longest distance from now on
) -> float:  # factor on the scores from now on
    "The softmax scale for a longer window: more keys need a sharper softmax (record 31)."
    return softmax_scale * (0.2 * math.log(new / old) + 1)


def yarn(
    frequencies: Tensor,  # at the start of the run
    softmax_scale: float,  # at the start of the run
    windows: list[int],  # long windows so far, in tokens
) -> tuple[Tensor, float]:  # frequencies and softmax scale now
    "Follow the long window from stage to stage."
    for old, new in itertools.pairwise(windows):
        frequencies, softmax_scale = stretched(frequencies, old, new), stretched_scale(softmax_scale, old, new)
    return frequencies, softmax_scale


# ---- 42_offset_and_pairs -------------------------------------------------------------------------

# b batch rows, t tokens per row, h heads, k head dim
def offset_keys(
    k_bthk: Tensor,  # after the rotation
) -> Tensor:  # (b, t, h, k)
    "The half of each key that does not turn comes from the token before (records 49 and 62)."
    turning, still = k_bthk.chunk(2, dim=-1)
    return torch.cat([turning, torch.cat([still[:, :1], still[:, :-1]], dim=1)], dim=-1)


PAIRED_LAYERS = (0, 2, 5, 9)


def in_pairs(
    x_bthk: Tensor,
) -> Tensor:  # (b, 2t, h/2, k)
    "Two rows for every token: the first half of the heads, then the second (record 58)."
    b, t, h, k = x_bthk.shape
    return x_bthk.reshape(b, 2 * t, h // 2, k)


def rotate_pairs(
    x_bthk: Tensor,
    cos_tk: Tensor,  # at least 2t rows
    sin_tk: Tensor,  # signed, from `rotary_table`
) -> Tensor:  # (b, t, h, k)
    "Turn even heads as at position 2t and odd heads as at position 2t + 1 (record 58)."
    b, t, h, k = x_bthk.shape
    wide = x_bthk.reshape(b, t, h // 2, 2 * k)  # neighbouring heads side by side
    return rotate(wide, cos_tk[: 2 * t].view(t, 2 * k), sin_tk[: 2 * t].view(t, 2 * k)).view(b, t, h, k)


# ---- 43_schedules --------------------------------------------------------------------------------

BATCH_FACTOR = (1, 2, 3, 3)  # tokens per step by stage, in units of the first stage
LR_FACTOR = (1.0, 1.52, 1.73, 1.0)  # about BATCH_FACTOR ** 0.6 and ** 0.5


def stage_batch(
    step: int,
    steps: int,  # scheduled steps
    first_len: int,  # tokens per part in the first stage
    first_max_len: int,  # longest piece of a document in the first stage
    max_len: int,  # longest piece later
) -> tuple[int, int]:  # tokens per part, longest piece of a document
    "Small batches of short documents first (records 46 and 72)."
    stage, _ = stage_at(step, steps)
    return BATCH_FACTOR[stage] * first_len, max_len if stage else first_max_len


def staged_tokens(
    step: int,
    steps: int,  # scheduled steps
    first_batch: int,  # tokens per step in the first stage
) -> int:
    "Tokens of all steps before a step."
    bounds = 0, *stage_bounds(steps), max(step, steps)
    lengths = (max(0, min(step, end) - start) for start, end in itertools.pairwise(bounds))
    return first_batch * sum(factor * length for factor, length in zip(BATCH_FACTOR, lengths, strict=True))


def staged_lr(
    step: int,
    steps: int,  # scheduled steps
    cooldown_frac: float = 0.6,  # share of the scheduled steps with a falling rate
    floor: float = 0.15,  # factor at the end and after it
) -> float:  # factor on every learning rate
    "A plateau for each batch size, then a straight line to the floor (records 46 and 72)."
    factor = LR_FACTOR[stage_at(step, steps)[0]]
    start = int(steps * (1 - cooldown_frac))
    done = min(1.0, max(0, step - start) / max(1, steps - start))
    return factor * (1 - done) + floor * done


def momentum_at(
    step: int,
    total_steps: int,
    warmup: int = 300,  # steps of rising momentum
    cooldown: int = 50,  # steps of falling momentum, at the end
) -> float:
    "Muon's momentum: 0.85 to 0.95, and back at the end (records 9 and 39)."
    rising, falling = step / warmup, (total_steps - step) / cooldown
    return 0.85 + 0.1 * min(1.0, rising, falling)


# ---- 50_fp8_head ---------------------------------------------------------------------------------

# t tokens, d model dim, v vocab; x8 stands for x in eight bits
ACTIVATION_SCALE = 100 / 448  # e4m3 ends at 448, so x may reach 100; after the norm |x| <= sqrt(768) = 27.7
WEIGHT_SCALE = 1.6 / 448  # weights may reach 1.6 (record 55)
GRADIENT_SCALE = 0.75 / 448  # stored in e5m2, which ends at 57,344; times the factor in front of the loss, if known


def quantise(
    x: Tensor,
    scale: float,  # what a stored 1.0 stands for
    dtype: torch.dtype,  # torch.float8_e4m3fn or torch.float8_e5m2
) -> Tensor:  # like x
    "Round to eight bits; no clamp, because the three scales leave room: norm, decay and softcap bound what arrives."
    return (x / scale).to(dtype)


@functools.cache
def unit_scale(device: torch.device) -> Tensor:
    "A one on the device, for the second of the two scales that cuBLASLt wants."
    return torch.ones((), device=device)


def check_factors(a8_mk: Tensor, b8_kn: Tensor, scale: Tensor) -> None:
    "Raise `ValueError` for factors that cuBLASLt would refuse with less to read."
    kinds = {a8_mk.dtype, b8_kn.dtype}
    if kinds not in ({torch.float8_e4m3fn}, {torch.float8_e4m3fn, torch.float8_e5m2}):
        raise ValueError("fp8_matmul takes e4m3 factors, one of which may be e5m2, "
                         f"not {a8_mk.dtype} and {b8_kn.dtype}")
    if a8_mk.dim() != 2 or b8_kn.dim() != 2 or a8_mk.shape[1] != b8_kn.shape[0]:
        raise ValueError(f"fp8_matmul cannot multiply {tuple(a8_mk.shape)} by {tuple(b8_kn.shape)}")
    if not a8_mk.is_contiguous():
        raise ValueError(f"the first factor must be row-major, its strides are {a8_mk.stride()}: use .contiguous()")
    if not b8_kn.T.is_contiguous():
        raise ValueError(f"the second factor must be column-major, its strides are {b8_kn.stride()}: "
                         "use .T.contiguous().T, a transposed copy seen as the matrix itself")
    if scale.dim() or scale.dtype != torch.float32 or scale.device != a8_mk.device:
        raise ValueError(f"the scale must be a 0-dim fp32 tensor on {a8_mk.device}, not {scale.dtype}, shape "
                         f"{tuple(scale.shape)}, on {scale.device}")
    if a8_mk.is_cuda and (b8_kn.shape[0] % 16 or b8_kn.shape[1] % 16):
        raise ValueError(f"a GPU multiplies FP8 by a {tuple(b8_kn.shape)} matrix only if both sizes are multiples of "
                         "16 (tokens, width and vocabulary): pad them")


@torch.library.custom_op("speedrun_script::fp8_matmul", mutates_args=())
def fp8_matmul(
    a8_mk: Tensor,  # e4m3 or e5m2, row-major
    b8_kn: Tensor,  # e4m3 or e5m2, column-major; not both e5m2
    scale: Tensor,  # 0-dim fp32 on the device: what a product of two stored ones stands for
    fast_accum: bool,  # leave the running sums to the tensor cores, which keep fewer bits of them
    dtype: torch.dtype,  # of the result
) -> Tensor:  # (m, n)
    "A product of two eight-bit matrices, times a scale; on a CPU the same numbers in fp32. Raises `ValueError`."
    check_factors(a8_mk, b8_kn, scale)
    if not a8_mk.is_cuda:
        return (a8_mk.float() @ b8_kn.float() * scale).to(dtype)
    if scale.data_ptr() % 16:
        scale = scale.clone()  # cuBLASLt of CUDA 13 wants 16-byte addresses: an element of a tensor may have another
    one = unit_scale(a8_mk.device)
    return torch._scaled_mm(a8_mk, b8_kn, scale_a=scale, scale_b=one, out_dtype=dtype, use_fast_accum=fast_accum)


@fp8_matmul.register_fake
def fp8_matmul_shape(a8_mk, b8_kn, scale, fast_accum, dtype):
    return a8_mk.new_empty((a8_mk.shape[0], b8_kn.shape[1]), dtype=dtype)


def plain_transpose(
    x: Tensor,  # (m, n)
) -> Tensor:  # (n, m), row-major
    "The plain way to turn a matrix around in memory; chapter 52 has a faster one."
    return x.T.contiguous()


def fp8_gradients(
    grad8_tv: Tensor,  # gradient of the logits over its scale, e5m2
    x8_td: Tensor,  # as the forward saved it, e4m3
    w8_dv: Tensor,  # as the forward saved it, e4m3, row-major
    grad_scale: Tensor,  # 0-dim fp32 on the device: GRADIENT_SCALE, times the upstream gradient if that was left out
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    transpose: Callable[[Tensor], Tensor] = plain_transpose,  # (m, n) -> (n, m), row-major
) -> tuple[Tensor, Tensor]:  # gradients of x (t, d) and w (d, v)
    "Both backward products; w8 serves as it lies, x8 and grad8 have to be turned around."
    grad_x_td = fp8_matmul(grad8_tv, w8_dv.T, grad_scale * WEIGHT_SCALE, False, x_dtype)
    grad_w_dv = fp8_matmul(transpose(x8_td), transpose(grad8_tv).T, grad_scale * ACTIVATION_SCALE, False, w_dtype)
    return grad_x_td, grad_w_dv


def choose_fp8(
    capability: tuple[int, int],  # compute capability of the GPU; (0, 0) for a CPU
    wish: str,  # "1" on, "0" off, "" as the hardware decides
) -> tuple[bool, str]:  # whether the head multiplies in FP8; what to tell the user, or ""
    "FP8 where there are tensor cores for it; raises `ValueError` for a wish that cannot come true."
    if wish not in ("", "0", "1"):
        raise ValueError(f"SPEEDRUN_FP8={wish} is neither 0 (bf16 head) nor 1 (FP8 head)")
    on_cpu, able = capability == (0, 0), capability >= (8, 9)
    need = "FP8 products need compute capability 8.9 (RTX 40, H100 or newer); this GPU has {}.{}".format(*capability)
    if wish == "1" and not on_cpu and not able:
        raise ValueError(f"SPEEDRUN_FP8=1: {need}")
    if wish:
        return wish == "1", "FP8 head: emulated on the CPU" if on_cpu and wish == "1" else ""
    if on_cpu:
        return False, "no FP8 head on a CPU (SPEEDRUN_FP8=1 emulates it)"
    return able, "" if able else f"{need}: the head multiplies in bf16"


@functools.cache
def decided_fp8(device_type: str) -> bool:
    "The choice for this machine, made and said once."
    capability = torch.cuda.get_device_capability() if device_type == "cuda" else (0, 0)
    use, message = choose_fp8(capability, os.environ.get("SPEEDRUN_FP8", ""))
    if message and os.environ.get("RANK", "0") == "0":
        print(message, flush=True)
    return use


@torch.compiler.assume_constant_result
def uses_fp8(
    device_type: str,  # "cuda", "cpu", ...
) -> bool:
    "Whether the training head multiplies in FP8; SPEEDRUN_FP8=0 or 1 overrides; the compiler asks while it traces."
    return decided_fp8(device_type)


# ---- 51_bf16_weights -----------------------------------------------------------------------------

def joined(
    high: Tensor,  # bf16
    low: Tensor,  # uint16, the bits that bf16 lacks
) -> Tensor:  # fp32
    "An fp32 number from its two halves (record 57)."
    return ((high.view(torch.uint16).to(torch.int32) << 16) | low.to(torch.int32)).view(torch.float32)


def halves(
    x: Tensor,  # fp32
) -> tuple[Tensor, Tensor]:  # bf16, cut and not rounded; uint16
    "The two halves of an fp32 number; `joined` gives it back to the bit."
    bits = x.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16).view(torch.uint16)


try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this system: the kernels below are plain functions that nobody calls
    triton, tl = SimpleNamespace(jit=lambda f: f), SimpleNamespace(constexpr=int)


# ---- 52_symmetric --------------------------------------------------------------------------------

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton looks once as well, at each `jit`


@functools.cache  # asking the driver takes longer than many a kernel
def capability_of(device: torch.device) -> tuple[int, int]:
    "Compute capability of a GPU; (0, 0) for a CPU."
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def processors(device: torch.device) -> int:
    "Streaming multiprocessors of a GPU; 1 for a CPU."
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


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


TRANSPOSE_TILES = {"9": (128, 128, 8), "fallback": (64, 128, 8)}  # block_m, block_n, warps; H100's, record 76's
ADD_TILES = {"9": (128, 128, 4), "fallback": (32, 32, 4)}  # the same, record 74's
COPIED_AS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # a copy has no need of arithmetic, nor of FP8 in Triton


def transpose_launch(
    dst_nm: Tensor,
    src_mn: Tensor,
    add: bool,
) -> None:
    "Run `transpose_kernel`."
    m, n = src_mn.shape
    block_m, block_n, warps = tiles_for(src_mn, ADD_TILES if add else TRANSPOSE_TILES)
    if not add:
        dst_nm, src_mn = (x.view(COPIED_AS[x.itemsize]) for x in (dst_nm, src_mn))
    with on_device_of(src_mn):
        transpose_kernel[triton.cdiv(n, block_n), triton.cdiv(m, block_m)](
            src_mn, dst_nm, m, n, add, block_m, block_n, num_warps=warps)


def check_transpose(name: str, src_mn: Tensor, dst_nm: Tensor | None = None) -> None:
    "Raise a `ValueError` that says what a transpose kernel takes."
    if src_mn.ndim != 2 or not src_mn.is_contiguous() or src_mn.itemsize not in COPIED_AS:
        raise ValueError(f"{name} takes a contiguous matrix of 1-, 2- or 4-byte numbers, not {tuple(src_mn.shape)} "
                         f"{src_mn.dtype} with strides {src_mn.stride()}: call .contiguous() first")
    if dst_nm is not None and not (dst_nm.shape == src_mn.shape[::-1] and dst_nm.is_contiguous()
                                   and dst_nm.dtype == src_mn.dtype):
        raise ValueError(f"{name} needs a contiguous target of shape {tuple(src_mn.shape[::-1])} and {src_mn.dtype}, "
                         f"not {tuple(dst_nm.shape)} {dst_nm.dtype} with strides {dst_nm.stride()}")


@torch.library.custom_op("speedrun_script::transposed", mutates_args=())
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


@torch.library.custom_op("speedrun_script::copy_transposed", mutates_args={"dst_nm"})
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


@torch.library.custom_op("speedrun_script::add_transposed", mutates_args={"dst_nm"})
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


@triton.jit
def symmetric_descriptor_kernel(
    x, x_tile, out, rows_of_x, side, inner, b, c, TALL: tl.constexpr, QUINTIC: tl.constexpr, FP32_DOT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    "The same for even sizes; descriptors of the stacked matrices let the GPU's copy engine move whole tiles."
    i, j = lower_tile(tl.program_id(0), side // BLOCK, GROUP)
    first, row, column = tl.program_id(1) * rows_of_x, i * BLOCK, j * BLOCK
    acc = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    if i == j:  # one strip is both factors
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


SYMMETRIC_TILES = {  # block, block_k, group, stages, warps, descriptors
    "9": (128, 64, 8, 3, 4, True),  # tuned on an H100
    "8": (128, 32, 8, 3, 8, False),  # these two fit; how fast they are we have not measured
    "fallback": (64, 32, 8, 3, 4, False),
}


def symmetric_launch(
    x_nsk: Tensor,  # any strides; fastest when one of the last two is 1
    b: float = 0.0,
    c: float = 1.0,
    quintic: bool = False,  # b·X + c·X·Xᵀ instead of X·Xᵀ
) -> Tensor:  # (n, s, s)
    "Run a kernel on each matrix of a stack, in one launch."
    n, side, inner = x_nsk.shape
    block, block_k, group, stages, warps, descriptors = tiles_for(x_nsk, SYMMETRIC_TILES)
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
                x, x_tile, tile, len(rows) // n, side, inner, b, c, tall, quintic, INTERPRETED, block, block_k, group,
                **sizes)
        else:
            symmetric_kernel[grid](
                x_nsk, out, side, inner, *x_nsk.stride(), b, c, quintic, even, INTERPRETED, block, block_k, group,
                **sizes)
    return out


def suits_symmetric(x: Tensor) -> bool:
    "Whether `symmetric_kernel` takes these matrices; the plain product takes all others."
    return takes_triton(x) and x.dtype in (torch.bfloat16, torch.float16) and x.numel() > 0


@torch.library.custom_op("speedrun_script::symmetric_gram", mutates_args=())
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


@torch.library.custom_op("speedrun_script::symmetric_quintic", mutates_args=())
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


# ---- 53_fused ------------------------------------------------------------------------------------

@triton.jit
def rounded_bf16(x):
    "What a GPU's cast to bf16 does; the interpreter's own cast cuts."
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def relu2_of(pre, INTERPRET: tl.constexpr):
    "bf16(relu(bf16(pre))²): two instructions for each pair of numbers."
    if INTERPRET:
        r = tl.maximum(rounded_bf16(pre), 0.0)
        post = rounded_bf16(r * r).to(tl.bfloat16)
    else:
        post = tl.inline_asm_elementwise(
            "{ .reg .b32 r; cvt.rn.relu.bf16x2.f32 r, $2, $1; mul.rn.bf16x2 $0, r, r; }",
            "=r,r,r", [pre], dtype=tl.bfloat16, is_pure=True, pack=2)
    return post


@triton.jit
def relu2_slope_times(grad, post, INTERPRET: tl.constexpr):
    "bf16(2·bf16(grad)·relu(pre)); the root of `post`, rounded to bf16, is relu(pre) to the bit (record 87's idea)."
    if INTERPRET:
        r = rounded_bf16(tl.sqrt(post.to(tl.float32)))
        out = rounded_bf16(2 * rounded_bf16(grad) * r).to(tl.bfloat16)
    else:
        out = tl.inline_asm_elementwise(
            """{ .reg .b32 low, high, g; shl.b32 low, $3, 16; and.b32 high, $3, 0xffff0000;
            sqrt.approx.ftz.f32 low, low; sqrt.approx.ftz.f32 high, high; cvt.rn.bf16x2.f32 low, high, low;
            cvt.rn.bf16x2.f32 g, $2, $1; add.rn.bf16x2 g, g, g; mul.rn.bf16x2 $0, g, low; }""",
            "=r,r,r,r", [grad, post], dtype=tl.bfloat16, is_pure=True, pack=2)
    return out


@triton.jit
def linear_relu2_kernel(
    x_desc, w_desc, post_desc, out_desc,  # (m, k), (n, k), (m, n), (m, n); the last two in half tiles
    m, n, K: tl.constexpr, BACKWARD: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    "out = relu2(x wᵀ), or backward x wᵀ times the slope of relu2; each program computes tiles until none is left."
    HALF: tl.constexpr = BLOCK_N // 2
    across = tl.cdiv(n, BLOCK_N)
    tiles = tl.cdiv(m, BLOCK_M) * across
    # flattened, both loops are one pipeline: the next tile's first blocks arrive while this tile is stored
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row = tile // across * BLOCK_M
        column = tile % across * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            x = x_desc.load([row, start])
            w = w_desc.load([column, start])
            if INTERPRET:
                total += tl.dot(x.to(tl.float32), w.to(tl.float32).T)  # of bf16 it would be wrong without a word
            else:
                total = tl.dot(x, w.T, total)
        # half a tile at a time needs half the shared memory, which the pipeline can use
        left, right = total.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        if BACKWARD:
            left = relu2_slope_times(left, post_desc.load([row, column]), INTERPRET)
        else:
            left = relu2_of(left, INTERPRET)
        out_desc.store([row, column], left)
        if BACKWARD:
            right = relu2_slope_times(right, post_desc.load([row, column + HALF]), INTERPRET)
        else:
            right = relu2_of(right, INTERPRET)
        out_desc.store([row, column + HALF], right)


MLP_TILES = {  # block_m, block_n, block_k, pipeline stages, warps; an H100 likes record 59's
    "9": (128, 256, 64, 4, 8),
    "fallback": (128, 128, 32, 3, 8),  # for 100 KB of shared memory
}
MLP_GRADIENT_TILES = {
    "9": (128, 256, 64, 3, 8),
    "fallback": (128, 128, 32, 3, 8),
}


def linear_relu2_launch(
    x_mk: Tensor,
    w_nk: Tensor,
    post_mn: Tensor | None = None,  # for the backward mode
    tiles: tuple[int, int, int, int, int] | None = None,  # as in `MLP_TILES`
) -> Tensor:  # (m, n)
    "Run `linear_relu2_kernel`."
    from triton.tools.tensor_descriptor import TensorDescriptor

    (m, k), n, table = x_mk.shape, len(w_nk), MLP_TILES if post_mn is None else MLP_GRADIENT_TILES
    block_m, block_n, block_k, stages, warps = tiles or tiles_for(x_mk, table)
    out_mn = x_mk.new_empty(m, n)
    x = TensorDescriptor(x_mk, [m, k], [k, 1], [block_m, block_k])
    w = TensorDescriptor(w_nk, [n, k], [k, 1], [block_n, block_k])
    out = TensorDescriptor(out_mn, [m, n], [n, 1], [block_m, block_n // 2])
    post = out if post_mn is None else TensorDescriptor(post_mn, [m, n], [n, 1], [block_m, block_n // 2])
    programs = min(processors(x_mk.device), -(-m // block_m) * -(-n // block_n))
    with on_device_of(x_mk):
        linear_relu2_kernel[programs,](
            x, w, post, out, m, n, k, post_mn is not None, INTERPRETED, block_m, block_n, block_k,
            num_warps=warps, num_stages=stages)
    return out_mn


@functools.cache
def runs_linear_relu2(
    device_type: str,
    dtype: torch.dtype,
) -> bool:
    "Whether there is a kernel: bf16 on a GPU that has tensor descriptors (Hopper and later), or in the interpreter."
    able = capability_of(torch.device(device_type)) >= (9, 0) if device_type == "cuda" else INTERPRETED
    return dtype == torch.bfloat16 and able and takes_triton(torch.empty(0, device=device_type))


@torch.library.custom_op("speedrun_script::linear_relu2", mutates_args=())
def linear_relu2(
    x_mk: Tensor,  # inputs; backward: gradient of what follows the second matrix
    w_nk: Tensor,  # first matrix; backward: second matrix
    post_mn: Tensor | None,  # backward: what the forward returned
) -> Tensor:  # (m, n): relu(x wᵀ)²; backward: gradient of x wᵀ
    "A matrix product and ReLU², or its gradient, in one kernel (record 59). Raises `ValueError`."
    given = [x_mk, w_nk] + ([] if post_mn is None else [post_mn])
    if x_mk.ndim != 2 or w_nk.ndim != 2 or x_mk.shape[1] != w_nk.shape[1]:
        raise ValueError(f"linear_relu2 cannot multiply {tuple(x_mk.shape)} by the transpose of {tuple(w_nk.shape)}")
    if post_mn is not None and post_mn.shape != (len(x_mk), len(w_nk)):
        raise ValueError(f"linear_relu2 needs post of shape {(len(x_mk), len(w_nk))}, not {tuple(post_mn.shape)}")
    if len({t.dtype for t in given}) > 1 or not all(t.is_contiguous() for t in given):
        raise ValueError("linear_relu2 takes contiguous matrices of one dtype, not " + ", ".join(
            f"{t.dtype} with strides {t.stride()}" for t in given) + ": use .contiguous() and .to()")
    if not runs_linear_relu2(x_mk.device.type, x_mk.dtype) or not len(x_mk):
        y_mn = F.linear(x_mk, w_nk)
        return F.relu(y_mn).square() if post_mn is None else 2 * y_mn * post_mn.sqrt()
    if x_mk.shape[1] % 8 or len(w_nk) % 8 or any(t.data_ptr() % 16 for t in given):
        raise ValueError(f"linear_relu2 needs rows that start at multiples of 16 bytes: pad {tuple(x_mk.shape)} and "
                         f"{tuple(w_nk.shape)} to multiples of 8 columns, and clone tensors that start elsewhere")
    return linear_relu2_launch(*given)


@linear_relu2.register_fake
def linear_relu2_shape(x_mk, w_nk, post_mn):
    return x_mk.new_empty(x_mk.shape[0], w_nk.shape[0])


class FusedMLP(torch.autograd.Function):
    "relu(x upᵀ)² down; what lies between the matrices is kept once, after the square, and no gradient of it is stored."

    @staticmethod
    def forward(ctx, x_td: Tensor, up_w: Tensor, down_w: Tensor) -> Tensor:
        post_tn = linear_relu2(x_td, up_w, None)
        ctx.save_for_backward(x_td, up_w, down_w, post_tn)
        return post_tn @ down_w

    @staticmethod
    def backward(ctx, grad_td: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_td, up_w, down_w, post_tn = ctx.saved_tensors
        grad_td = grad_td.contiguous()
        pre_grad_tn = linear_relu2(grad_td, down_w, post_tn)
        return pre_grad_tn @ up_w, pre_grad_tn.T @ x_td, post_tn.T @ grad_td


@torch.compiler.assume_constant_result
def fuses_mlp(device_type: str, dtype: torch.dtype) -> bool:
    "The compiler asks this while it reads the network."
    return runs_linear_relu2(device_type, dtype)


# b batch rows, t tokens per row, d model dim
def fused_relu2_mlp(
    x_btd: Tensor,
    up_w: Tensor,  # (4d, d)
    down_w: Tensor,  # (4d, d), stored like `up_w`
) -> Tensor:  # (b, t, d)
    "`relu2_mlp` whose activation happens where the first product ends (record 59), where there is a kernel for it."
    if not fuses_mlp(x_btd.device.type, x_btd.dtype):
        return relu2_mlp(x_btd, up_w, down_w)
    return FusedMLP.apply(x_btd.flatten(0, -2), up_w, down_w).view_as(x_btd)


@triton.jit
def tanh_of(x, INTERPRET: tl.constexpr):
    "One instruction, with a relative error below 2^-11; the sigmoid would take two."
    if INTERPRET:
        y = 2 * tl.sigmoid(2 * x) - 1
    else:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def exp2_of(t, INTERPRET: tl.constexpr):
    "2^(11.5 log2(e) t - 17); every second one by a polynomial (relative error 8e-5), to spare the special functions."
    HALF: tl.constexpr = 11.5 * 1.4426950408889634
    if INTERPRET:
        y = tl.exp2(HALF * t - 17.0)
    else:  # s has the nearest integer in its last bits, from where a shift takes it to the exponent; f is the rest
        y = tl.inline_asm_elementwise("""{ .reg .f32 s, f, p; .reg .b32 i, j;
            fma.rn.f32 $0, $2, 0f4184BA5B, 0fC1880000; ex2.approx.ftz.f32 $0, $0;
            fma.rn.f32 s, $3, 0f4184BA5B, 0f4B3FFFEF; sub.f32 f, 0f4B3FFFEF, s;
            fma.rn.f32 f, $3, 0f4184BA5B, f; fma.rn.f32 p, f, 0f3D61FBB0, 0f3E786F0D;
            fma.rn.f32 p, p, f, 0f3F31798D; fma.rn.f32 p, p, f, 0f3F7FFB49;
            mov.b32 i, s; mov.b32 j, p; shl.b32 i, i, 23; add.s32 j, j, i; mov.b32 $1, j; }""",
            "=&f,=&f,f,f", [t], dtype=tl.float32, is_pure=True, pack=2)
    return y


@triton.jit
def softcapped_kernel(
    z_ptr, target_ptr, weight_ptr, loss_ptr, grad_ptr, rows, grad_factor,
    V: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):
    "Loss and gradient of one row of logits after the other; a row stays in registers, the next one is on its way."
    LOG2_E: tl.constexpr = 1.4426950408889634
    HALF: tl.constexpr = 11.5 * LOG2_E  # softcap(z) = 11.5 + 11.5 t with t = tanh((z + 5) / 15)
    column = tl.arange(0, CHUNK)
    weights = ()
    weight = 0.0
    for k in tl.static_range(N):
        weights = weights + (tl.load(weight_ptr + k),)
        weight += weights[k]
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        start = tl.cast(row, tl.int64) * V
        targets = ()
        target_z = ()
        for k in tl.static_range(N):
            targets = targets + (tl.load(target_ptr + row + k, mask=row + k < rows, other=-1).to(tl.int32),)
            target_z = target_z + (tl.load(z_ptr + start + targets[k], mask=row + k < rows, other=0.0),)
        total = tl.zeros((CHUNK,), tl.float32)
        kept = ()
        for i in tl.static_range(0, V, CHUNK):
            z = tl.load(z_ptr + start + i + column, mask=i + column < V, other=0.0).to(tl.float32)
            t = tanh_of(z * (1 / 15) + 1 / 3, INTERPRET)
            kept = kept + (t.to(tl.float16),)
            e = exp2_of(t, INTERPRET)
            total += e if i + CHUNK <= V else tl.where(i + column < V, e, 0.0)
        # the exponents lie between -34 and 0: no maximum is needed
        log_sum = tl.log2(tl.sum(total)) + 17.0
        level = tl.log2(weight * grad_factor) - log_sum
        loss = 0.0
        at_target = ()  # gradients there; p - 1 may be small, so that they are computed from t before it was rounded
        for k in tl.static_range(N):
            t = tanh_of(target_z[k].to(tl.float32) * (1 / 15) + 1 / 3, INTERPRET)
            loss += tl.where(row + k < rows, weights[k] * (log_sum / LOG2_E - 11.5 * t), 0.0)
            hit = 0.0
            for j in tl.static_range(N):
                hit += tl.where(targets[j] == targets[k], weights[j], 0.0)
            at_target = at_target + ((tl.exp2(HALF * t + level) - hit * grad_factor) * (1 - t * t),)
        tl.store(loss_ptr + row, loss)
        for i in tl.static_range(0, V, CHUNK):
            t = kept[i // CHUNK].to(tl.float32)
            grad = (1 - t * t) * tl.exp2(HALF * t + level)
            here = False
            for k in tl.static_range(N):
                here |= targets[k] // CHUNK == i // CHUNK
            if here:
                for k in tl.static_range(N):
                    grad = tl.where(i + column == targets[k], at_target[k], grad)
            tl.store(grad_ptr + start + i + column, grad.to(grad_ptr.dtype.element_ty), mask=i + column < V)


LOSS_TILES = {"9": (4096, 16, 3), "fallback": (4096, 16, 1)}  # chunk of a row, warps, stages; tuned on an H100
LONGEST_ROW = 53_248  # two rows fit into the shared memory of a Hopper GPU


def softcapped_launch(
    z_tv: Tensor,
    targets_t: Tensor,
    weights_n: Tensor,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    "Run `softcapped_kernel` with one program on each processor."
    t, v = z_tv.shape
    chunk, warps, stages = tiles_for(z_tv, LOSS_TILES)
    loss_t, grad_tv = z_tv.new_empty(t, dtype=torch.float32), z_tv.new_empty(z_tv.shape, dtype=grad_dtype)
    unit = GRADIENT_SCALE if grad_dtype == torch.float8_e5m2 else 1.0
    with on_device_of(z_tv):
        softcapped_kernel[min(t, processors(z_tv.device)),](
            z_tv, targets_t, weights_n, loss_t, grad_tv, t, 11.5 / 15 / unit, v, len(weights_n), chunk, stages,
            INTERPRETED, num_warps=warps)
    return loss_t, grad_tv


def plain_softcapped_losses(z_tv: Tensor, targets_t: Tensor, weights_n: Tensor) -> tuple[Tensor, Tensor]:
    "Losses and their gradients by the formulas of the kernel, in the precision of the logits, at least fp32."
    z_tv = z_tv.to(torch.promote_types(z_tv.dtype, torch.float32))
    loss_t = mtp_losses(softcap(z_tv)[None], targets_t[None], weights_n)[0]
    grad_tv, rows = weights_n.sum() * softcap(z_tv).softmax(-1), torch.arange(len(z_tv), device=z_tv.device)
    for shift, weight in enumerate(weights_n.unbind()):
        inside = rows < len(rows) - shift
        hit = torch.where(inside, -weight, 0).to(grad_tv.dtype)
        grad_tv.index_put_((rows, targets_t.roll(-shift)), hit, accumulate=True)
    u_tv = softcap(z_tv) / 23
    return loss_t, grad_tv * (23 / 7.5) * u_tv * (1 - u_tv)


@torch.library.custom_op("speedrun_script::softcapped_losses", mutates_args=())
def softcapped_losses(
    z_tv: Tensor,  # logits before the softcap
    targets_t: Tensor,  # int64: the next token of each position; from 0 to v - 1, which is not checked
    weights_n: Tensor,  # weight of the next token, of the one after it, ...; their sum is positive
    grad_dtype: torch.dtype,  # of the gradient; for float8_e5m2 it is divided by GRADIENT_SCALE
) -> tuple[Tensor, Tensor]:  # (t,) fp32; (t, v): gradient of the sum of the losses with respect to z
    """Softcap, multi-token cross-entropy, and their gradient in one pass (records 60, 67, 75, 79).

    By a kernel for bf16 logits of at most `LONGEST_ROW` columns, else by the plain formulas. Raises `ValueError`.
    """
    if z_tv.ndim != 2 or targets_t.shape != z_tv.shape[:1] or targets_t.dtype != torch.int64 or weights_n.ndim != 1:
        raise ValueError(f"softcapped_losses takes logits (t, v), int64 targets (t,) and weights (n,), not "
                         f"{tuple(z_tv.shape)}, {targets_t.dtype} {tuple(targets_t.shape)}, {tuple(weights_n.shape)}")
    if not all(x.is_contiguous() for x in (z_tv, targets_t, weights_n)):
        raise ValueError("softcapped_losses takes contiguous tensors: use .contiguous()")
    if takes_triton(z_tv) and z_tv.dtype == torch.bfloat16 and z_tv.shape[1] <= LONGEST_ROW and len(z_tv):
        return softcapped_launch(z_tv, targets_t, weights_n.float(), grad_dtype)
    loss_t, grad_tv = plain_softcapped_losses(z_tv, targets_t, weights_n)
    if grad_dtype == torch.float8_e5m2:
        grad_tv = grad_tv / GRADIENT_SCALE
    return loss_t.float(), grad_tv.to(grad_dtype)


@softcapped_losses.register_fake
def softcapped_losses_shape(z_tv, targets_t, weights_n, grad_dtype):
    return z_tv.new_empty(z_tv.shape[0], dtype=torch.float32), z_tv.new_empty(z_tv.shape, dtype=grad_dtype)


class FusedHeadLoss(torch.autograd.Function):
    "Head, softcap and loss; the gradient of the logits is all that is left of them."

    @staticmethod
    def forward(ctx, x_td: Tensor, w_dv: Tensor, targets_t: Tensor, weights_n: Tensor) -> Tensor:
        ctx.dtypes = x_td.dtype, w_dv.dtype
        if uses_fp8(x_td.device.type):
            x_td = quantise(x_td, ACTIVATION_SCALE, torch.float8_e4m3fn).contiguous()
            w_dv = quantise(w_dv, WEIGHT_SCALE, torch.float8_e4m3fn).contiguous()
            scale = torch.full((), ACTIVATION_SCALE * WEIGHT_SCALE, device=x_td.device)
            z_tv = fp8_matmul(x_td, transposed(w_dv).T, scale, True, torch.bfloat16)
            loss_t, grad_tv = softcapped_losses(z_tv, targets_t, weights_n, torch.float8_e5m2)
        else:
            loss_t, grad_tv = softcapped_losses(x_td @ w_dv, targets_t, weights_n, x_td.dtype)
        ctx.save_for_backward(x_td, w_dv, grad_tv)
        return loss_t.sum()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_td, w_dv, grad_tv = ctx.saved_tensors
        if grad_tv.dtype == torch.float8_e5m2:
            scale = upstream * GRADIENT_SCALE
            return *fp8_gradients(grad_tv, x_td, w_dv, scale, *ctx.dtypes, transpose=transposed), None, None
        return upstream * (grad_tv @ w_dv.T), upstream * (x_td.T @ grad_tv), None, None


# t tokens, d model dim, v vocab, n targets per position
def fused_head_loss(
    x_td: Tensor,  # normed
    w_dv: Tensor,  # the head
    targets_t: Tensor,  # int64: the next token of each position
    weights_n: Tensor,  # fp32: weights of the next token, of the one after it, ...
) -> Tensor:  # scalar, at least fp32: sum over tokens
    "The training loss from the last hidden states, without keeping the logits (records 60, 67, 79)."
    if uses_fp8(x_td.device.type) or (x_td.is_cuda and x_td.dtype == torch.bfloat16):
        return FusedHeadLoss.apply(x_td, w_dv, targets_t, weights_n)
    z_tv = x_td @ w_dv
    z_tv = z_tv.to(torch.promote_types(z_tv.dtype, torch.float32))
    return mtp_losses(softcap(z_tv)[None], targets_t[None], weights_n).sum()


# ---- 54_sharded ----------------------------------------------------------------------------------

def divisible(
    shape: tuple[int, ...],  # of a bank
) -> tuple[int, ...]:
    "The shape with so many matrices more that 1, 2, 4 or 8 processes can share them evenly."
    return -(-shape[0] // PARTS) * PARTS, *shape[1:]


SHARDED = ("lm_head", "embed", "value_embeds", "bigram_embed", "qk_bank", "vo_bank", "mlp_bank")
# torch 2.13 gave two collectives new names and warns about the old ones, which are all that 2.11 has
reduce_to_shares = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
gather_shares = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class Exchange:
    "Brings each process the averaged gradient of its share, and everyone the new shares of all (records 24 and 61)."

    def __init__(self):
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.coming: dict[Tensor, tuple[dist.Work | None, Tensor]] = {}  # parameter -> gradient on its way
        self.going: list[tuple[dist.Work, Tensor]] = []  # new shares on their way

    def share(self, x: Tensor) -> Tensor:
        "This process's rows: one of `size` equal pieces."
        rows = len(x) // self.size
        return x[self.rank * rows : (self.rank + 1) * rows]

    def send(self, p: Tensor, grad: Tensor, in_shares: bool) -> None:
        "Start to average a gradient; with `in_shares` each process gets only its own rows."
        work, mean = None, grad
        if self.size > 1 and in_shares:
            mean = torch.empty_like(self.share(grad))
            work = reduce_to_shares(mean, grad, async_op=True)
        elif self.size > 1:
            work = dist.all_reduce(grad, async_op=True)
        self.coming[p] = work, mean

    def receive(self, p: Tensor) -> Tensor:
        "The averaged gradient, once it is there."
        work, mean = self.coming.pop(p)
        if work:
            work.wait()
            mean.div_(self.size)  # a power of two: exact
        return mean

    def spread(self, p: Tensor, share: Tensor) -> None:
        "Start to send this process's new rows to all."
        if self.size > 1:
            share = share.clone()  # what is sent must not be part of what is filled
            self.going.append((gather_shares(p, share, async_op=True), share))

    def finish(self) -> None:
        "Wait until every share has arrived."
        while self.going:
            self.going.pop(0)[0].wait()

    def whole_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        "The state of a whole parameter from everyone's state of its share; counters are the same everywhere."
        return {key: self.whole(x) if x.dim() else x for key, x in state.items()}

    def whole(self, share: Tensor) -> Tensor:
        "All shares, one after the other."
        if self.size == 1:
            return share
        full = share.new_empty((self.size * len(share), *share.shape[1:]))
        # as bytes, since some numbers, such as the uint16 of a mantissa, have no type of their own on the way
        gather_shares(full.view(torch.uint8), share.contiguous().view(torch.uint8))
        return full

    def share_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        "This process's part of the state of a whole parameter."
        return {key: self.share(x).clone() if x.dim() else x for key, x in state.items()}


SCATTER_ORDER = (  # in which gradients start their way: the matrices first, which take longest to update
    "qk_bank", "vo_bank", "mlp_bank", "scalars", "smear_gate", "skip_gate", "attn_gate_bank", "ve_gate_bank", "lm_head",
    "bigram_embed", "post_lambdas", "x0_lambdas", "bigram_lambdas", "resid_lambdas", "xsa_alphas", "value_embeds",
    "embed", "mudd_w1", "mudd_w2", "mudd_b2")
WORK_ORDER = (  # in which parameters are updated: what travels longest afterwards first, behind it the matrices' work
    "scalars", "smear_gate", "skip_gate", "attn_gate_bank", "ve_gate_bank", "mudd_b2", "xsa_alphas", "post_lambdas",
    "x0_lambdas", "bigram_lambdas", "resid_lambdas", "mudd_w2", "value_embeds", "bigram_embed", "mudd_w1", "lm_head",
    "embed", "qk_bank", "vo_bank", "mlp_bank")


# ---- 55_sparse -----------------------------------------------------------------------------------

SPARSE_FROM = 8  # processes, as in record 71; with fewer there is less to gain (chapter 55 estimates)


class SparseRows:
    "Averages the gradient of a table of which a step uses few rows: only those travel (record 71)."

    def __init__(
        self,
        rows: int,  # of the table; divisible by the number of processes
        exchange: Exchange,
    ):
        self.exchange, self.active = exchange, exchange.size >= SPARSE_FROM
        self.used, self.counting, self.announced = torch.zeros(rows, dtype=torch.bool), None, False

    def mark(self, inputs_bt: Tensor) -> None:
        "Note the rows of tokens, on the CPU, whose gradient the coming backward pass adds to."
        if self.active:
            self.used[bigram_rows(inputs_bt, len(self.used)).flatten()] = True

    def mark_gradient(self, grad: Tensor | None) -> None:
        "Note the rows of a gradient that waits for the next step: a checkpoint has it, but not its tokens."
        if self.active and grad is not None:
            self.used |= grad.any(1).cpu()

    def announce(self, device: torch.device) -> None:
        "Start to tell each process how many of its rows come from here; every process has to call, once before `send`."
        if not self.active:
            return
        self.announced = True
        size, rank = self.exchange.size, self.exchange.rank
        rows = self.used.nonzero().squeeze(1).int()  # rising and without repetition: a row sent twice would count twice
        borders = torch.searchsorted(rows, torch.arange(size + 1, dtype=torch.int32) * (len(self.used) // size))
        counts = borders.diff()
        rows = torch.cat([rows[: borders[rank]], rows[borders[rank + 1] :]])  # one's own need no journey
        counts[rank] = 0
        self.used.zero_()
        self.send_counts, self.receive_counts = counts, torch.empty_like(counts)
        self.counting = dist.all_to_all_single(self.receive_counts, counts, async_op=True)  # on the CPU: no GPU waits
        self.rows = (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)

    def exchange_rows(self) -> None:
        "Start to send the numbers of the rows, if they were announced; the counts have arrived by now."
        if self.counting is None:
            return
        self.counting.wait()
        self.counting = None
        self.splits = self.receive_counts.tolist(), self.send_counts.tolist()
        self.received_rows = self.rows.new_empty(sum(self.splits[0]))
        self.numbering = dist.all_to_all_single(self.received_rows, self.rows, *self.splits, async_op=True)

    def send(self, grad: Tensor) -> None:
        "Start to send the gradient's rows to those who own them."
        if not self.announced:
            raise RuntimeError("the rows of this step were not announced: call `announce` and `exchange_rows` before")
        values = grad[self.rows]
        self.values = values.new_empty((sum(self.splits[0]), values.shape[1]))
        self.sending = dist.all_to_all_single(self.values, values, *self.splits, async_op=True), values  # kept alive

    def receive(self, grad: Tensor) -> Tensor:
        "The averaged gradient of this process's rows; what others sent is added to `grad`, which is then used up."
        self.announced = False
        self.numbering.wait()
        self.sending[0].wait()
        grad.index_add_(0, self.received_rows, self.values)
        return self.exchange.share(grad).div_(self.exchange.size)


# ---- 56_replay -----------------------------------------------------------------------------------

class GraphRecorder:
    "Records CUDA graphs, on a stream of their own; they take turns in one pool of memory."

    def __init__(self):
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def prepare(self, run: Callable[[], Any]) -> None:
        "Run once, so that everything is compiled and every kernel loaded before it is recorded."
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            run()
        here.wait_stream(self.stream)

    def record(self, run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:  # to be replayed; result of the run
        "Note which kernels a run would launch, without launching them."
        graph = torch.cuda.CUDAGraph()
        # threads that load data or watch NCCL may go on meanwhile
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            result = run()
        return graph, result


@dataclass
class Recording:
    "The passes of one kind of part, and the memory they read and write."

    inputs: list[Tensor]
    loss: Tensor
    upstream: Tensor  # gradient of the loss
    forward_pass: Any  # has .replay()
    backward_pass: Any


class Play(torch.autograd.Function):
    "Both passes from a recording; the backward pass adds to the gradients of the parameters by itself."

    @staticmethod
    def forward(ctx, anchor: Tensor, recording: Recording) -> Tensor:
        ctx.recording = recording
        recording.forward_pass.replay()
        return recording.loss.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[None, None]:
        ctx.recording.upstream.copy_(upstream)
        ctx.recording.backward_pass.replay()
        return None, None


class Replay(nn.Module):
    "A network whose two passes are recorded for each kind of part, and replayed from then on."

    def __init__(
        self,
        model: nn.Module,  # returns a loss
        bare_model: nn.Module,  # the same one, not compiled; scalars among its attributes are frozen in a recording
        recorder: GraphRecorder,  # or `TapeRecorder`
    ):
        super().__init__()
        self.model, self.recorder = model, recorder
        self.scalars = [x for x in vars(bare_model).values() if isinstance(x, Tensor) and not x.dim()]
        self.recordings: dict[tuple, Recording] = {}
        self.grads = {p: torch.zeros_like(p) for p in model.parameters()}
        self.anchor = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)

    def forward(self, *batch: Tensor) -> Tensor:
        "The loss of a part; without gradients, as in validation, nothing is recorded."
        if not torch.is_grad_enabled():
            return self.model(*batch)
        self.hold_gradients()
        kind = tuple(x.shape if x.dim() else x.item() for x in (*batch, *self.scalars))
        if kind not in self.recordings:
            self.recordings[kind] = self.record([*batch])
        recording = self.recordings[kind]
        for mine, new in zip(recording.inputs, batch, strict=True):
            mine.copy_(new)
        return Play.apply(self.anchor, recording)

    def hold_gradients(self) -> None:
        "Gradients stay where the recordings write them, also when the optimizer has dropped them."
        for p, grad in self.grads.items():
            if p.grad is None:
                grad.zero_()
            elif p.grad is not grad:  # from a checkpoint
                grad.copy_(p.grad)
            p.grad = grad

    def record(self, inputs: list[Tensor]) -> Recording:
        "Record both passes; the inputs' memory will hold the inputs of every part of this kind."
        upstream = torch.zeros_like(self.anchor)  # so that the trial adds nothing to the gradients
        self.recorder.prepare(lambda: self.model(*inputs).backward(upstream))
        forward_pass, loss = self.recorder.record(lambda: self.model(*inputs))
        backward_pass, _ = self.recorder.record(lambda: loss.backward(upstream))
        return Recording(inputs, loss.detach(), upstream, forward_pass, backward_pass)


def replays(device_type: str) -> bool:
    "Whether passes are recorded on a device: on GPUs, unless SPEEDRUN_REPLAY=0. Raises `ValueError`."
    wish = os.environ.get("SPEEDRUN_REPLAY", "1")
    if wish not in ("0", "1"):
        raise ValueError(f"SPEEDRUN_REPLAY={wish} is neither 0 (launch every kernel) nor 1 (record and replay)")
    return device_type == "cuda" and wish == "1"


# ---- 57_fused_rotary -----------------------------------------------------------------------------

# b batch rows, t tokens per row, h heads, k head dim; queries, keys and values of a token lie side by side: 3h heads
def plain_rotary_heads(
    qkv_bthk: Tensor,  # (b, t, 3h, k)
    cos_tk: Tensor,  # from `rotary_table`; 2t rows where heads are paired
    sin_tk: Tensor,
    paired: bool,  # odd heads turn as one position later
    offset: bool,  # half of each key comes from the token before
) -> tuple[Tensor, Tensor, Tensor]:  # queries, keys and values, (b, t, h, k) each
    "Normed and turned queries and keys, by the functions of their chapters; values as they are."
    q_bthk, k_bthk, v_bthk = qkv_bthk.chunk(3, dim=-2)
    turn = rotate_pairs if paired else rotate
    q_bthk, k_bthk = (turn(x, cos_tk, sin_tk) for x in norm_queries_keys(q_bthk, k_bthk))
    return q_bthk, offset_keys(k_bthk) if offset else k_bthk, v_bthk


@triton.jit
def even_and_odd(x):
    "Neighbouring dimensions (n, k) as two blocks (n, k/2) in fp32."
    return tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def side_by_side(even, odd, INTERPRET: tl.constexpr):
    "The opposite, in bf16."
    x = tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))
    return (rounded_bf16(x) if INTERPRET else x).to(tl.bfloat16)


@triton.jit
def inverse_length(even, odd, K: tl.constexpr):
    "One over the root mean square, (n, 1)."
    return tl.rsqrt(tl.sum(even * even + odd * odd, 1) / K + 1.1920929e-07)[:, None]


@triton.jit
def angles(cos_ptr, sin_ptr, t, tokens, PAIRED: tl.constexpr, K: tl.constexpr):
    "Cosine and sine of each pair of dimensions for even and for odd heads, (n, k/2); the tables have each twice."
    row = tl.minimum(t, tokens - 1)
    at = (2 * row if PAIRED else row)[:, None] * K + 2 * tl.arange(0, K // 2)[None, :]
    odd = at + K if PAIRED else at
    return (tl.load(cos_ptr + at).to(tl.float32), tl.load(sin_ptr + at).to(tl.float32),
            tl.load(cos_ptr + odd).to(tl.float32), tl.load(sin_ptr + odd).to(tl.float32))


@triton.jit
def one_of(first, second, SECOND: tl.constexpr):
    "The choice is made while the kernel is compiled."
    if SECOND:
        out = second
    else:
        out = first
    return out


@triton.jit
def rotary_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, tokens,
    H: tl.constexpr, K: tl.constexpr, PAIRED: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    "Queries, keys and values of some tokens."
    t, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, K)[None, :]
    inside, token = (t < tokens)[:, None], t.to(tl.int64)[:, None]
    cos_a, sin_a, cos_b, sin_b = angles(cos_ptr, sin_ptr, t, tokens, PAIRED, K)
    for i in tl.static_range(3 * H):
        x = tl.load(qkv_ptr + (token * 3 * H + i) * K + column, mask=inside, other=0.0)
        here = (token * H + i % H) * K + column
        if i < 2 * H:
            even, odd = even_and_odd(x)
            r = inverse_length(even, odd, K)
            cos = r * one_of(cos_a, cos_b, PAIRED and i % H % 2 == 1)
            sin = r * one_of(sin_a, sin_b, PAIRED and i % H % 2 == 1)
            y = side_by_side(cos * even + sin * odd, cos * odd - sin * even, INTERPRET)
            if i < H:
                tl.store(q_ptr + here, y, mask=inside)
            elif OFFSET:
                late = column >= K // 2  # goes to the token after
                tl.store(k_ptr + here + tl.where(late, H * K, 0), y, mask=inside & (token + late < tokens))
                tl.store(k_ptr + here, y, mask=inside & late & (token == 0))
            else:
                tl.store(k_ptr + here, y, mask=inside)
        else:
            tl.store(v_ptr + here, x, mask=inside)


@triton.jit
def rotary_gradient_kernel(
    qkv_ptr, grad_ptr, q_grad_ptr, k_grad_ptr, v_grad_ptr, cos_ptr, sin_ptr, tokens,
    H: tl.constexpr, K: tl.constexpr, PAIRED: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    "Gradient of the products of some tokens from those of queries, keys and values."
    t, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, K)[None, :]
    inside, token = (t < tokens)[:, None], t.to(tl.int64)[:, None]
    cos_a, sin_a, cos_b, sin_b = angles(cos_ptr, sin_ptr, t, tokens, PAIRED, K)
    for i in tl.static_range(3 * H):
        there, here = (token * 3 * H + i) * K + column, (token * H + i % H) * K + column
        if i < 2 * H:
            if i < H:
                grad = tl.load(q_grad_ptr + here, mask=inside, other=0.0).to(tl.float32)
            elif OFFSET:
                late = column >= K // 2
                grad = tl.load(k_grad_ptr + here + tl.where(late, H * K, 0), mask=inside & (token + late < tokens),
                               other=0.0).to(tl.float32)
                grad += tl.load(k_grad_ptr + here, mask=inside & late & (token == 0), other=0.0).to(tl.float32)
            else:
                grad = tl.load(k_grad_ptr + here, mask=inside, other=0.0).to(tl.float32)
            even, odd = even_and_odd(tl.load(qkv_ptr + there, mask=inside, other=0.0))
            r = inverse_length(even, odd, K)
            even, odd = even * r, odd * r
            cos = one_of(cos_a, cos_b, PAIRED and i % H % 2 == 1)
            sin = one_of(sin_a, sin_b, PAIRED and i % H % 2 == 1)
            grad_even, grad_odd = even_and_odd(grad)
            turned_even, turned_odd = cos * grad_even - sin * grad_odd, cos * grad_odd + sin * grad_even
            along = tl.sum(turned_even * even + turned_odd * odd, 1)[:, None] / K
            y = side_by_side(r * (turned_even - along * even), r * (turned_odd - along * odd), INTERPRET)
        else:
            y = tl.load(v_grad_ptr + here, mask=inside, other=0.0)
        tl.store(grad_ptr + there, y, mask=inside)


ROTARY_TILES = {"9": (16, 4), "fallback": (16, 4)}  # tokens of a program, warps


@functools.cache
def runs_rotary(
    device_type: str,
    dtype: torch.dtype,
) -> bool:
    "Whether there is a kernel: bf16 on a GPU from Ampere on, or in the interpreter."
    return dtype == torch.bfloat16 and takes_triton(torch.empty(0, device=device_type))


def check_rotary(qkv_thk: Tensor, cos_tk: Tensor, sin_tk: Tensor, paired: bool) -> None:
    "Raise `ValueError` for what the kernels do not take."
    if qkv_thk.ndim != 3 or qkv_thk.shape[1] % 3 or not runs_rotary(qkv_thk.device.type, qkv_thk.dtype):
        raise ValueError(f"rotary_heads takes (t, 3h, k) in bf16 on a GPU, not {tuple(qkv_thk.shape)} "
                         f"{qkv_thk.dtype} on {qkv_thk.device.type}")
    t, heads, k = qkv_thk.shape
    if k & (k - 1) or (paired and heads // 3 % 2):
        raise ValueError("rotary_heads needs a head dim that is a power of two, and an even number of heads for pairs, "
                         f"not {heads // 3} heads of {k}")
    if not all(x.is_contiguous() and x.shape[1:] == (k,) and len(x) >= t * (1 + paired) for x in (cos_tk, sin_tk)):
        raise ValueError(f"rotary_heads needs contiguous tables with {t * (1 + paired)} rows of {k}, not "
                         f"{tuple(cos_tk.shape)} and {tuple(sin_tk.shape)}")
    if not qkv_thk.is_contiguous():
        raise ValueError(f"rotary_heads takes contiguous heads, not strides {qkv_thk.stride()}: use .contiguous()")


@torch.library.custom_op("speedrun_script::rotary_heads", mutates_args=())
def rotary_heads(
    qkv_thk: Tensor,  # (t, 3h, k) bf16, contiguous; k is a power of two
    cos_tk: Tensor,  # from `rotary_table`; 2t rows where heads are paired
    sin_tk: Tensor,
    paired: bool,
    offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (t, h, k) each
    "`plain_rotary_heads` in one kernel. Raises `ValueError`."
    check_rotary(qkv_thk, cos_tk, sin_tk, paired)
    t, heads, k = qkv_thk.shape
    out = [qkv_thk.new_empty(t, heads // 3, k) for _ in range(3)]
    block, warps = tiles_for(qkv_thk, ROTARY_TILES)
    if t:
        with on_device_of(qkv_thk):
            rotary_kernel[triton.cdiv(t, block),](
                qkv_thk, *out, cos_tk, sin_tk, t, heads // 3, k, paired, offset, block, INTERPRETED, num_warps=warps)
    return tuple(out)


@rotary_heads.register_fake
def rotary_heads_shape(qkv_thk, cos_tk, sin_tk, paired, offset):
    return tuple(qkv_thk.new_empty(qkv_thk.shape[0], qkv_thk.shape[1] // 3, qkv_thk.shape[2]) for _ in range(3))


@torch.library.custom_op("speedrun_script::rotary_heads_backward", mutates_args=())
def rotary_heads_backward(
    q_grad_thk: Tensor, k_grad_thk: Tensor, v_grad_thk: Tensor, qkv_thk: Tensor, cos_tk: Tensor, sin_tk: Tensor,
    paired: bool, offset: bool,
) -> Tensor:  # like qkv_thk
    "Gradient of `rotary_heads`."
    t, heads, k = qkv_thk.shape
    grad_thk = torch.empty_like(qkv_thk)
    block, warps = tiles_for(qkv_thk, ROTARY_TILES)
    if t:
        with on_device_of(qkv_thk):
            rotary_gradient_kernel[triton.cdiv(t, block),](
                qkv_thk, grad_thk, q_grad_thk, k_grad_thk, v_grad_thk, cos_tk, sin_tk, t, heads // 3, k, paired, offset,
                block, INTERPRETED, num_warps=warps)
    return grad_thk


@rotary_heads_backward.register_fake
def rotary_heads_gradient_shape(q_grad_thk, k_grad_thk, v_grad_thk, qkv_thk, *_):
    return qkv_thk.new_empty(qkv_thk.shape)


class RotaryHeads(torch.autograd.Function):
    "The operator and its gradient."

    @staticmethod
    def forward(ctx, qkv_thk: Tensor, cos_tk: Tensor, sin_tk: Tensor, paired: bool, offset: bool) -> tuple[Tensor, ...]:
        ctx.save_for_backward(qkv_thk, cos_tk, sin_tk)
        ctx.kind = paired, offset
        return rotary_heads(qkv_thk, cos_tk, sin_tk, paired, offset)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grads = [grad.contiguous() for grad in grads]
        return rotary_heads_backward(*grads, *ctx.saved_tensors, *ctx.kind), None, None, None, None


@torch.compiler.assume_constant_result
def fuses_rotary(device_type: str, dtype: torch.dtype) -> bool:
    "The compiler asks this while it reads the network."
    return runs_rotary(device_type, dtype)


def fused_rotary_heads(
    qkv_bthk: Tensor,  # (b, t, 3h, k)
    cos_tk: Tensor,  # from `rotary_table`; 2t rows where heads are paired
    sin_tk: Tensor,
    paired: bool,  # odd heads turn as one position later
    offset: bool,  # half of each key comes from the token before
) -> tuple[Tensor, Tensor, Tensor]:  # queries, keys and values, (b, t, h, k) each
    "`plain_rotary_heads`, for one batch row in one kernel where there is one."
    if len(qkv_bthk) > 1 or not fuses_rotary(qkv_bthk.device.type, qkv_bthk.dtype):
        return plain_rotary_heads(qkv_bthk, cos_tk, sin_tk, paired, offset)
    return tuple(x_thk[None] for x_thk in RotaryHeads.apply(qkv_bthk.squeeze(0), cos_tk, sin_tk, paired, offset))


# ---- 90_recipe -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    "The hyperparameters of this rung; choices between techniques are folded into the code."

    num_layers: int = 12  # transformer blocks
    num_heads: int = 12  # attention heads; the head dimension is model_dim / num_heads
    rotary_base: float = 1024.0  # the slowest rotary pair turns 1/rotary_base radians per token
    softmax_scale: float = 0.12  # factor on the scores of normed queries and keys
    seq_len: int = 1024  # tokens per row
    batch_rows: int = 512  # rows per optimizer step over all processes
    steps: int = 19_560  # optimizer steps
    cooldown_frac: float = 0.0  # share of steps with a falling learning rate (trapezoid only)
    adam_lr: float = 6e-4  # peak learning rate of AdamW
    muon_lr: float = 0.02  # learning rate of Muon
    muon_momentum: float = 0.95  # momentum of Muon (Nesterov)
    normuon_beta2: float = 0.9  # decay of NorMuon's second moment
    adam_decay: float = 0.005  # base of the cautious decay of tables and scalars
    muon_decay: float = 1.2  # base of the cautious decay of matrices
    bigram_size: int = 251_520  # rows of the table of token pairs
    max_len: int = 2048  # longest piece of a document, in tokens
    val_len: int = 262_144  # tokens per part in validation
    window_block: int = 128  # tokens; windows are multiples of it
    first_max_len: int = 896  # longest piece in the first stage
    extension: int = 10  # steps after the schedule, with the widest windows
    momentum_warmup: int = 300  # steps of rising momentum
    momentum_cooldown: int = 50  # steps of falling momentum, at the end


@dataclass(frozen=True)
class Size:
    "Width, vocabulary and data of a model, independent of the rung."

    name: str
    model_dim: int  # d, width of the residual stream
    tokenizer: Literal["bytes", "gpt2"]
    vocab_size: int  # v
    data: str  # folder under $DATA_PATH/data with the shards
    val_tokens: int  # validation tokens, at most


SIZES = {size.name: size for size in (
    Size("nano", 128, "bytes", 257, "demo_bytes", 30_720),
    Size("mini", 384, "gpt2", 50_257, "fineweb10B", 10_485_760),
    Size("full", 768, "gpt2", 50_257, "fineweb10B", 10_485_760),
)}


# ---- 91_gpt --------------------------------------------------------------------------------------

# b batch rows, t tokens per row, d model dim, h heads, k head dim, l layers, v vocab
class GPT(nn.Module):
    "The network of every rung after the baseline; its forward is the table of contents of the course."

    def __init__(self, recipe: Recipe, size: Size):
        super().__init__()
        self.recipe = recipe
        d, layers = size.model_dim, recipe.num_layers
        vocab_size = padded(size.vocab_size)
        self.lm_head = nn.Parameter(torch.randn(d, vocab_size) * 0.005)
        self.embed = nn.Parameter(self.lm_head.detach().T.contiguous())
        self.frequencies = rotary_frequencies(d // recipe.num_heads, recipe.rotary_base)
        positions = max(3 * recipe.seq_len, recipe.val_len)
        cos_tk, sin_tk = rotary_table(self.frequencies, 2 * positions)
        self.register_buffer("rotary_cos", cos_tk, persistent=False)
        self.register_buffer("rotary_sin", sin_tk, persistent=False)
        self.make_banks(layers, d)
        self.make_streams(layers, d, vocab_size)
        # run-time values in CPU scalars: a compiled network reads them, and does not compile again when they change
        self.softmax_scale = torch.tensor(recipe.softmax_scale)
        self.short, self.long = torch.zeros((), dtype=torch.int32), torch.zeros((), dtype=torch.int32)
        self.past_windows: list[tuple[int, int]] = []  # those that the rotary tables follow
        self.register_buffer("mtp_weights", torch.empty(3), persistent=False)
        self.at_step(0)
        for name, p in self.named_parameters():
            if name not in ("scalars", "resid_lambdas", "post_lambdas", "x0_lambdas", "bigram_lambdas", "xsa_alphas"):
                p.data = p.data.bfloat16()

    def make_banks(self, layers: int, d: int) -> None:
        "The matrices of all layers stacked by shape, so that the optimizer handles each shape in one call."
        with_attention = layers - 1
        shapes = (2 * with_attention, d, d), (2 * with_attention, d, d), (2 * layers, 4 * d, d)
        # unused matrices at the end, so that eight processes can share
        shapes = shapes[0], *(divisible(shape) for shape in shapes[1:])
        qk, vo, mlp = (uniform_weights(*shape) for shape in shapes)
        mlp[1::2] = 0
        qk = qk.view(-1, 2 * d // self.recipe.num_heads, d)
        qk = torch.cat([qk, torch.zeros(divisible(qk.shape)[0] - len(qk), *qk.shape[1:])])
        vo[2 * with_attention :] = 0
        self.qk_bank, self.vo_bank, self.mlp_bank = nn.Parameter(qk), nn.Parameter(vo), nn.Parameter(mlp)

    def make_streams(self, layers: int, d: int, vocab_size: int) -> None:
        "The small parameters and the tables beside the blocks."
        heads = self.recipe.num_heads
        self.x0_lambdas = nn.Parameter(torch.zeros(layers))
        self.resid_lambdas = nn.Parameter(torch.full((layers, 2), math.sqrt(1.1)))
        self.post_lambdas = nn.Parameter(torch.ones(layers, 2))
        self.scalars = nn.Parameter(initial_scalars(layers))
        self.skip_gate = nn.Parameter(torch.zeros(1, GATE_DIMS))
        self.value_embeds = nn.Parameter(0.01 * torch.randn(len(VALUE_LAYERS) * vocab_size, d))
        self.ve_gate_bank = nn.Parameter(torch.zeros(len(VALUE_LAYERS), heads, GATE_DIMS))
        self.smear_gate = nn.Parameter(torch.zeros(1, GATE_DIMS))
        self.attn_gate_bank = nn.Parameter(torch.zeros(layers - 1, heads, GATE_DIMS))
        self.bigram_embed = nn.Parameter(torch.zeros(self.recipe.bigram_size, d))
        self.bigram_lambdas = nn.Parameter(torch.full((layers,), 0.05))
        self.mudd_w1 = nn.Parameter((2 * torch.rand(2, MUDD_DIM, d) - 1) / math.sqrt(d))
        self.mudd_w2 = nn.Parameter(torch.zeros(2, MUDD_OUTPUTS, MUDD_DIM))
        self.mudd_b2 = nn.Parameter(initial_mudd_bias())
        self.xsa_alphas = nn.Parameter(torch.zeros(layers, heads))

    def at_step(self, step: int) -> None:
        "Set what depends on the step: weights of the targets, windows, and what follows the long window."
        weights = mtp_weights(step, self.recipe.steps)
        # always three of them in the same memory: a compiled network wants one shape, a recorded one the same place
        self.mtp_weights.copy_(torch.tensor(weights + [0.0] * (3 - len(weights))))
        windows = stage_windows(step, self.recipe.steps, self.recipe.window_block)
        if windows != self.past_windows:
            self.past_windows = windows
            frequencies, scale = yarn(self.frequencies, self.recipe.softmax_scale, [long for _, long in windows])
            cos_tk, sin_tk = rotary_table(frequencies.to(self.rotary_cos.device), len(self.rotary_cos))
            self.rotary_cos.copy_(cos_tk)
            self.rotary_sin.copy_(sin_tk)
            self.softmax_scale.fill_(scale)
        short, long = windows[-1]
        self.short.fill_(short)
        self.long.fill_(long)

    def attention(self, a_btd: Tensor, layer: int, matrices: tuple[Tensor, ...], extra_v: Tensor | None = None,
                  gate_w: Tensor | None = None, cu_seqlens: Tensor | None = None,
                  max_len: Tensor | None = None) -> Tensor:
        "What one layer's attention gathers, (b, t, h, k); the matrices of queries, keys and values are (d, d)."
        qkv_bthk = split_heads(a_btd, torch.cat(matrices), 3 * self.recipe.num_heads)
        q, k, v = fused_rotary_heads(
            qkv_bthk, self.rotary_cos, self.rotary_sin, layer in PAIRED_LAYERS, layer in LONG_LAYERS)
        if extra_v is not None:
            v = v + extra_v
        gathered_v = v
        if layer in PAIRED_LAYERS:
            q, k, v = in_pairs(q), in_pairs(k), in_pairs(v)
        window = self.long if layer in LONG_LAYERS else self.short
        rows = q.shape[1] // a_btd.shape[1]  # two for every token where heads are paired
        # squeezed, not indexed: the gradient of an index is a copy
        y = varlen_attention(
            q.squeeze(0), k.squeeze(0), v.squeeze(0), cu_seqlens, max_len, window, self.softmax_scale, rows)
        y = y.reshape(gathered_v.shape)
        if layer in XSA_LAYERS:
            y = exclude_self(y, gathered_v, self.xsa_alphas[layer])
        y = gated_heads(y, a_btd, gate_w)
        return y

    def hidden(self, inputs_bt: Tensor, cu_seqlens: Tensor | None = None, max_len: Tensor | None = None) -> Tensor:
        "What the head reads, (b, t, d)."
        last = self.recipe.num_layers - 1
        x_btd = F.embedding(inputs_bt, self.embed)  # compiled, its gradient adds up in fp32; that of indexing in bf16
        scalars = self.scalars.unbind()
        resid, post = (p.bfloat16().flatten().unbind() for p in (self.resid_lambdas, self.post_lambdas))
        x_btd = smear(x_btd, self.smear_gate, scalars[-2])
        x_btd = rms_norm(x_btd)
        x0_btd, x0_lambdas = x_btd, self.x0_lambdas.bfloat16().unbind()
        pairs_btd = F.embedding(bigram_rows(inputs_bt, self.recipe.bigram_size), self.bigram_embed)
        bigram_lambdas = self.bigram_lambdas.bfloat16().unbind()
        x_btd = x_btd + bigram_lambdas[0] * pairs_btd
        values = dict(zip(VALUE_LAYERS, value_rows(self.value_embeds, inputs_bt), strict=True))
        start_btd = x_btd
        used = 2 * (self.recipe.num_layers - 1) * self.vo_bank.shape[1] // self.qk_bank.shape[1]
        qk, vo = self.qk_bank[:used].view(-1, *self.vo_bank.shape[1:]).unbind(), self.vo_bank.unbind()
        mlp, outputs = self.mlp_bank.unbind(), []
        for i in range(self.recipe.num_layers):
            keep, gain, keep_mlp, gain_mlp = resid[2 * i], post[2 * i], resid[2 * i + 1], post[2 * i + 1]
            if i == SKIP_TO:
                x_btd = x_btd + skip_strength(x0_btd, self.skip_gate, scalars[-1]) * outputs[SKIP_FROM]
            else:
                n = i - (i > SKIP_TO)  # number among the layers with attention
                qkv_w, o_w = torch.cat([*qk[2 * n : 2 * n + 2], vo[2 * n]]), vo[2 * n + 1]
                qkv_w, o_w = scalars[2 * i] * qkv_w, scalars[2 * i + 1] * o_w
                a_btd = rms_norm(outputs[LATE_FROM] if i > LATE_FROM else x_btd)
                if i == last:
                    m = mudd_coefficients(x_btd, self.mudd_w1[0], self.mudd_w2[0], self.mudd_b2[0])
                    keep, gain, _, _, keep_mlp, gain_mlp = m[8:]
                    extra_v, x_btd = last_layer_inputs(
                        m, x_btd, start_btd, outputs[LATE_FROM], values[i], self.recipe.num_heads)
                elif i in VALUE_LAYERS:
                    extra_v = gated_values(values[i], a_btd, self.ve_gate_bank[VALUE_LAYERS.index(i)])
                else:
                    extra_v = None
                gate_w = self.attn_gate_bank[n]
                y_bthk = self.attention(a_btd, i, qkv_w.chunk(3), extra_v, gate_w, cu_seqlens, max_len)
                y_btd = F.linear(y_bthk.flatten(2), o_w)
                x_btd = keep * x_btd + gain * y_btd
                if i == last:
                    entering_btd = m[10] * start_btd + m[11] * pairs_btd
                elif i > 0:
                    entering_btd = x0_lambdas[i] * x0_btd + bigram_lambdas[i] * pairs_btd
                else:
                    entering_btd = x0_lambdas[i] * x0_btd
                x_btd = x_btd + entering_btd
            y_btd = fused_relu2_mlp(rms_norm(x_btd), up_w=mlp[2 * i], down_w=mlp[2 * i + 1])
            x_btd = keep_mlp * x_btd + gain_mlp * y_btd
            outputs.append(x_btd)
        m = mudd_coefficients(x_btd, self.mudd_w1[1], self.mudd_w2[1, :5], self.mudd_b2[1, :5])
        sources = start_btd, outputs[LATE_FROM], outputs[last - 1], values[VALUE_LAYERS[0]], outputs[SKIP_FROM]
        for weight, source_btd in zip(m, sources, strict=True):
            x_btd = x_btd + weight * source_btd
        return rms_norm(x_btd)

    def logits(self, inputs_bt: Tensor, cu_seqlens: Tensor | None = None, max_len: Tensor | None = None) -> Tensor:
        "Scores of every next token, (b, t, v)."
        x_btd = self.hidden(inputs_bt, cu_seqlens, max_len)
        z_btv = x_btd @ self.lm_head
        return softcap(z_btv)

    def forward(self, inputs_bt: Tensor, targets_bt: Tensor, cu_seqlens: Tensor | None = None,
                max_len: Tensor | None = None) -> Tensor:
        "Mean cross-entropy of the next token in nats, a scalar; with several targets the weighted sum over all tokens."
        if self.training:
            x_btd = self.hidden(inputs_bt, cu_seqlens, max_len)
            return fused_head_loss(x_btd.squeeze(0), self.lm_head, targets_bt.squeeze(0), self.mtp_weights)
        z_btv = self.logits(inputs_bt, cu_seqlens, max_len).float()
        return F.cross_entropy(z_btv.flatten(0, 1), targets_bt.flatten())


def build_model(recipe: Recipe, size: Size) -> nn.Module:
    "The network of a recipe at a size, with fresh weights from torch's global generator."
    return GPT(recipe, size)


# ---- 92_optimizer --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Rule:
    "How one parameter is trained."

    rule: Literal["adam", "muon"]
    lr: float = 1.0  # factor on the base learning rate of the rule
    decay: float = 0.0  # factor on the base weight decay of the rule
    betas: tuple[float, float] = (0.9, 0.95)  # Adam only
    lr_odd: float = 1.0  # Muon only: factor on every second matrix of the bank
    travels: Literal["all", "shares", "rows"] = "all"  # how processes exchange gradients: chapters 54 and 55


def parameter_rules() -> dict[str, Rule]:  # parameter name -> rule
    "The table of a recipe (record 82's factors)."
    betas = (0.5, 0.95)
    rules = {
        "lm_head": Rule("adam", decay=150, betas=betas),
        "embed": Rule("adam", decay=150, betas=betas),
        "qk_bank": Rule("muon", decay=1),
        "vo_bank": Rule("muon", decay=1),
        "mlp_bank": Rule("muon", decay=1, lr_odd=2),
    }
    small, slow, table = (0.9, 0.95), (0.9, 0.99), (0.75, 0.95)
    rules["x0_lambdas"] = Rule("adam", betas=small)
    rules["resid_lambdas"] = Rule("adam", lr=5, betas=small)
    rules["post_lambdas"] = Rule("adam", betas=small)
    rules["scalars"] = Rule("adam", lr=5, betas=slow)
    rules["skip_gate"] = Rule("adam", lr=0.05, betas=slow)
    rules["value_embeds"] = Rule("adam", lr=75, decay=5, betas=table)
    rules["ve_gate_bank"] = Rule("adam", decay=1, betas=slow)
    rules["smear_gate"] = Rule("adam", lr=0.01, betas=slow)
    rules["attn_gate_bank"] = Rule("adam", decay=1, betas=slow)
    rules["bigram_embed"] = Rule("adam", lr=75, decay=5, betas=table)
    rules["bigram_lambdas"] = Rule("adam", betas=small)
    rules |= {name: Rule("adam", lr=0.25, decay=1, betas=slow) for name in ("mudd_w1", "mudd_w2")}
    rules["mudd_b2"] = Rule("adam", lr=0.25, betas=slow)
    rules["xsa_alphas"] = Rule("adam", betas=small)
    rules |= {name: replace(rules[name], travels="shares") for name in SHARDED}
    rules["bigram_embed"] = replace(rules["bigram_embed"], travels="rows")
    return rules


def adam_step_size(
    state: dict[str, Tensor],  # exp_avg, exp_avg_sq, step; filled at the first call
    like: Tensor,
    lr: float,
    betas: tuple[float, float],
) -> float:
    "Count one update; the learning rate with the correction of moments that start at zero."
    if not state:
        state |= {"exp_avg": torch.zeros_like(like, dtype=torch.float32),
                  "exp_avg_sq": torch.zeros_like(like, dtype=torch.float32), "step": torch.zeros(())}
    state["step"] += 1
    t = state["step"].item()
    return lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)


def adam_direction(
    grad: Tensor,
    exp_avg: Tensor,  # fp32, changed in place
    exp_avg_sq: Tensor,  # fp32, changed in place
    new1: float | Tensor,  # 1 - beta1, the weight of what is new
    new2: float | Tensor,
) -> Tensor:  # fp32
    "What the step size multiplies."
    grad = grad.float()
    exp_avg += new1 * (grad - exp_avg)
    exp_avg_sq += new2 * (grad.square() - exp_avg_sq)
    return exp_avg / (exp_avg_sq.sqrt() + 1e-10)


class Optimizer(torch.optim.Optimizer):
    "Adam for tables and scalars, Muon for banks; one parameter group per parameter, as the table says."

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        compile: bool = False,  # compile the arithmetic of both rules
    ):
        self.recipe, self.params = recipe, dict(model.named_parameters())
        rules, base = parameter_rules(), {"adam": recipe.adam_lr, "muon": recipe.muon_lr}
        groups = [vars(rules[name]) | {"params": [p], "name": name, "lr": base[rules[name].rule] * rules[name].lr,
                                       "momentum": recipe.muon_momentum} for name, p in self.params.items()]
        super().__init__(groups, {})
        self.move_adam = self.move_small = self.adam
        self.move_muon = self.muon
        if compile:  # a graph for each size of table and each bank, and one for all that is small
            self.move_adam = torch.compile(self.adam, dynamic=False, fullgraph=True)
            self.move_small = torch.compile(self.adam, dynamic=True, fullgraph=True)
            self.move_muon = torch.compile(self.muon, dynamic=False, fullgraph=True)
        self.step_number = 1  # set by the training loop before every step
        self.exchange = Exchange()
        self.sparse = SparseRows(recipe.bigram_size, self.exchange)

    def due(self) -> list[dict]:
        "The groups that the next step updates; their gradients must be complete."
        if self.step_number % 2 == 0:
            return [group for group in self.param_groups if group["rule"] == "muon"]
        return self.param_groups

    @torch.no_grad()
    def step(self) -> None:
        "Update the parameters that are due, and drop their gradients."
        head, embed, split = self.params["lm_head"], self.params["embed"], split_step(self.recipe.steps)
        tied = self.step_number % 2 == 1 and self.step_number <= split
        if tied:
            add_transposed(head.grad, embed.grad)
            embed.grad = None
        groups = [group for group in self.due() if group["params"][0].grad is not None]
        self.send_gradients(groups)
        groups.sort(key=lambda group: WORK_ORDER.index(group["name"]))
        for group in groups:
            p = group["params"][0]
            share, grad = self.receive_gradient(p, group)
            if group["rule"] == "muon":
                self.step_muon(share, grad, self.state[p], group)
            else:
                self.step_adam(share, grad, self.state[p], group)
            p.grad = None
            if group["travels"] != "all":
                self.exchange.spread(p, share)
        self.exchange.finish()
        if tied:
            copy_transposed(embed, head)
            if self.step_number == split:
                state = self.exchange.share_state(transposed_state(self.whole_state(head)))
                self.state[embed] = state

    def announce_rows(self, inputs: list[Tensor]) -> None:
        "Note which rows of the bigram table a step will use, and tell the others when their gradient is due."
        for inputs_bt in inputs:
            self.sparse.mark(inputs_bt)
        if self.step_number % 2 == 1:
            self.sparse.announce(self.params["bigram_embed"].device)

    def send_gradients(self, groups: list[dict]) -> None:
        "Start to average all gradients; the work on the first begins while the last are on their way."
        for group in sorted(groups, key=lambda group: SCATTER_ORDER.index(group["name"])):
            p = group["params"][0]
            if group["travels"] == "rows" and self.sparse.active:
                self.sparse.send(p.grad)
            else:
                self.exchange.send(p, p.grad, in_shares=group["travels"] != "all")

    def receive_gradient(self, p: Tensor, group: dict) -> tuple[Tensor, Tensor]:
        "What this process updates of a parameter, and the averaged gradient for it."
        if group["travels"] == "rows" and self.sparse.active:
            return self.exchange.share(p), self.sparse.receive(p.grad)
        if group["travels"] == "all":
            return p, self.exchange.receive(p)
        return self.exchange.share(p), self.exchange.receive(p)

    def whole_state(self, p: Tensor) -> dict[str, Tensor]:
        "State of a parameter, from all processes; every process has to ask."
        if self.rule_of(p)["travels"] != "all":
            return self.exchange.whole_state(self.state[p])
        return self.state[p]

    def set_state(self, p: Tensor, state: dict[str, Tensor]) -> None:
        "Put what `whole_state` gave in place, for any number of processes."
        if self.rule_of(p)["travels"] != "all":
            state = self.exchange.share_state(state)
        self.state[p] = state

    def rule_of(self, p: Tensor) -> dict:
        "The group of a parameter."
        return next(group for group in self.param_groups if group["params"][0] is p)

    def step_adam(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        "One update by Adam's rule."
        step_size = adam_step_size(state, p, group["lr"], group["betas"])
        decay = group["lr"] ** 2 * self.recipe.adam_decay * group["decay"]
        # scalars as tensors on the CPU: a compiled rule reads them, and does not compile again when they change
        numbers = torch.tensor([*(1 - beta for beta in group["betas"]), step_size, decay]).unbind()
        move = self.move_adam if p.numel() > 2**20 else self.move_small
        move(p.view(-1), grad.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1), *numbers)

    def adam(self, p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, new1: Tensor, new2: Tensor,
             step_size: Tensor, decay: Tensor) -> None:
        "Adam's rule."
        update = adam_direction(grad, exp_avg, exp_avg_sq, new1, new2) * step_size
        update += cautious_decay(p.float(), update, strict=True) * decay
        p.copy_(p.float() - update)

    def step_muon(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        "One update by Muon's rule, for all matrices of a bank, or of a share of it, at once."
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
            one = p[..., :1] if p.shape[-2] >= p.shape[-1] else p[..., :1, :]  # of each neuron
            state["second_moment"] = torch.zeros_like(one, dtype=torch.float32)
            state["mantissa"] = torch.zeros_like(p, dtype=torch.uint16)
        shape_factor = math.sqrt(max(1, p.shape[-2] / p.shape[-1]))
        decay = self.recipe.muon_decay * group["lr"] * group["decay"]
        numbers = torch.tensor([group["momentum"], group["lr"] * shape_factor, decay])
        self.move_muon(p, grad, state, self.matrix_factors(p, group), *numbers.unbind())

    def matrix_factors(self, p: Tensor, group: dict) -> Tensor:
        "A factor on the learning rate of each matrix of a bank, or of this process's share of it, (n, 1, 1)."
        factors = torch.ones(len(group["params"][0]), 1, 1)
        factors[1::2] = group["lr_odd"]
        factors = self.exchange.share(factors)
        return factors.to(p.device, non_blocking=True)

    def muon(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], factors: Tensor, momentum: Tensor, lr: Tensor,
             decay: Tensor) -> None:
        "Muon's rule."
        update = nesterov(state["momentum_buffer"], grad.float(), momentum)
        update = polar_express(update, symmetric_gram, symmetric_quintic)
        update = equalise(update, state, self.recipe.normuon_beta2)
        old = joined(p, state["mantissa"])
        new = old - update * (lr * factors)
        new -= cautious_decay(old, update, strict=False) * (decay * lr * factors)
        new, low = halves(new)
        state["mantissa"].copy_(low)
        p.copy_(new)


# ---- 93_train ------------------------------------------------------------------------------------

class RunError(RuntimeError):
    "A run that cannot start or go on; the message says why and what to do."


class Interrupted(RunError):
    "The run was asked to stop; its checkpoint and log are on disk."


@dataclass(frozen=True)
class World:
    "This process among all processes of the run."

    rank: int
    size: int  # number of processes
    device: torch.device

    @property
    def parts(self) -> list[int]:
        "The parts of a step that this process computes: micro-step m takes part m * size + rank."
        return list(range(self.rank, PARTS, self.size))

    def average(self, x: Tensor) -> Tensor:
        "Mean over all processes, in place."
        if self.size > 1:
            dist.all_reduce(x)
            x.div_(self.size)
        return x


def join_world(
    device: str,  # "auto", "cpu" or "cuda"
) -> World:
    "Find this process's place and device and join the process group; raises `RunError` when they cannot be had."
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if PARTS % size:
        raise RunError(f"{PARTS} parts per step cannot be shared by {size} processes; use 1, 2, 4 or 8")
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("a GPU was asked for, but torch sees none; use --device cpu, or run `speedrun doctor`")
    if device == "cpu" or not torch.cuda.is_available():
        place = torch.device("cpu")
    else:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")
    if size > 1 and not dist.is_initialized():
        # NCCL refuses two processes on one GPU; gloo serves there, and on CPUs
        own_gpu = place.type == "cuda" and size <= torch.cuda.device_count()
        dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpu else "gloo")
    return World(rank, size, place)


@dataclass(frozen=True)
class Run:
    "Options of one run that do not change what is computed, except the seed and the data."

    data_dir: Path  # folder with train and val shards
    run_dir: Path  # folder for log and checkpoint
    seed: int = 0
    val_every: int = 125  # steps between validations
    save_every: int = 1000  # steps between checkpoints; the end is always saved
    log_every: int = 10  # steps between reads of the training loss (each one waits for the GPU)
    compile: bool = False  # compile the model with torch.compile
    resume: bool = False  # continue from the checkpoint in run_dir
    rung: str = ""  # of an exported script, whose recipe does not say it


class RunLog:
    "Text log in the original's format and JSON lines; only the first process writes."

    def __init__(
        self,
        run_dir: Path,  # made if missing
        rank: int,
        resume: bool = False,  # append to the log of an earlier run instead of refusing to overwrite it
    ):
        self.rank = rank
        if rank:
            return
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            log = run_dir / "log.jsonl"
            if not resume and log.exists() and log.stat().st_size:  # empty: an earlier call ended before it began
                whole = (run_dir / "checkpoint.safetensors").exists()
                advice = "add --resume to continue it" if whole else "it has no checkpoint: delete it"
                raise RunError(f"{run_dir} already holds a run; {advice} or name another --out")
            self.text_file = (run_dir / "log.txt").open("a" if resume else "w", encoding="utf-8")
            self.json_file = log.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write to run folder {run_dir} ({error.strerror}); "
                           "name another with --out") from None

    def text(self, line: str, console: bool = False) -> None:
        "Append a line to the text log, and show it on request."
        if self.rank == 0:
            print(line, file=self.text_file, flush=True)
            if console:
                self.show(line)

    def show(self, line: str) -> None:
        "Show a line to the person watching."
        print(line, flush=True)

    def record(self, **values: Any) -> None:
        "Append a JSON line."
        if self.rank == 0:
            print(json.dumps(values), file=self.json_file, flush=True)

    def progress(self, step: int, steps: int, train_time_ms: float, tokens: int, train_loss: float) -> None:
        "Log a training step whose loss was read; `tokens` counts all tokens trained on so far."
        self.text(f"step:{step}/{steps} train_loss:{train_loss:.4f} train_time:{train_time_ms:.0f}ms "
                  f"step_avg:{train_time_ms / step:.2f}ms")
        self.record(step=step, train_loss=train_loss, train_time_ms=train_time_ms, tokens=tokens)

    def validation(self, step: int, steps: int, train_time_ms: float, tokens: int, val_loss: float) -> None:
        "Log a validation."
        self.text(f"step:{step}/{steps} val_loss:{val_loss:.4f} train_time:{train_time_ms:.0f}ms "
                  f"step_avg:{train_time_ms / max(step, 1):.2f}ms", console=True)
        self.record(step=step, val_loss=val_loss, train_time_ms=train_time_ms, tokens=tokens)


def build_optimizer(recipe: Recipe, model: nn.Module, compile: bool = False) -> torch.optim.Optimizer:
    "PyTorch's AdamW, or from the rung `muon` on the optimizer that grows."
    return Optimizer(recipe, model, compile)


def lr_factor(recipe: Recipe, step: int) -> float:
    "Factor on every peak learning rate at a step (0..steps - 1); the unstaged ones are read in the middle of the step."
    return staged_lr(step, recipe.steps, recipe.cooldown_frac)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    meta: dict[str, Any],  # JSON-serialisable: step, loader position, recipe, size
    world: World,
) -> None:
    "Write weights, optimizer state and position atomically; every process has to call, the first one writes."
    tensors = {f"model.{name}": p.detach() for name, p in model.state_dict().items()}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.whole_state(p)
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
        if p.grad is not None:  # waits for the next step
            tensors[f"gradient.{i}"] = world.average(p.grad)
    # every process now has the rows of all
    optimizer.sparse.mark_gradient(model.bigram_embed.grad)
    if world.rank:
        return
    partial = path.with_suffix(".partial")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"run": json.dumps(meta)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {path} ({error}); free some space or name another --out. An earlier checkpoint, "
                       "if any, is whole: --resume continues from it") from None


def read_checkpoint(
    path: Path,
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # tensors by name, metadata
    "Tensors and metadata of a checkpoint; raises `RunError` when it is missing or damaged."
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["run"])  # noqa: SIM118
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint at {path}; train first, or name another folder") from None
    except (SafetensorError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not a checkpoint of this course or is damaged ({error})") from None


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    expected: dict[str, Any],  # metadata that must agree, e.g. the recipe
) -> dict[str, Any]:  # the metadata
    "Put a checkpoint's weights and optimizer state in place; raises `RunError` when it belongs to another run."
    tensors, meta = read_checkpoint(path)
    for key, value in expected.items():
        if meta.get(key, "") != value:
            raise RunError(f"{path} was made with another {key}: {meta.get(key)}; resume with the same one")
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        prefix = f"optimizer.{i}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        optimizer.set_state(p, {k: v.to(p.device) if v.dim() else v for k, v in state.items()})
        if f"gradient.{i}" in tensors:
            p.grad = tensors[f"gradient.{i}"].to(p.device)
    optimizer.sparse.mark_gradient(model.bigram_embed.grad)
    return meta


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    "Collect SIGINT and SIGTERM in a list instead of dying; a second signal interrupts at once."
    caught: list[int] = []

    def remember(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, e.g. a notebook widget: leave the handlers alone
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopwatch:
    "Milliseconds of training so far; pausing waits until the GPU has finished."

    def __init__(self, device: torch.device, ms: float = 0.0):
        self.device, self.before, self.started = device, ms, time.perf_counter()

    def read(self) -> float:
        "Milliseconds so far, without waiting for the GPU."
        return self.before + 1e3 * (time.perf_counter() - self.started)

    def pause(self) -> float:
        "Wait for the GPU and stop counting."
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.before = self.read()
        return self.before

    def go_on(self) -> None:
        "Count again."
        self.started = time.perf_counter()


def forward(
    model: nn.Module,
    batch: tuple[Tensor, ...],  # one part, from a loader; scalars stay on the CPU
    world: World,
) -> Tensor:  # loss, a scalar on the device
    "The loss of one part; matrix products in bf16 on a GPU."
    batch = [x.to(world.device, non_blocking=True) if x.dim() else x for x in batch]
    # one compiled network for parts of every length
    for x in batch[:3]:
        torch._dynamo.mark_dynamic(x, x.dim() - 1)
    return model(*batch)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, ...]],  # this process's parts
    world: World,
) -> Tensor:  # mean loss of this process's parts, a scalar on the device
    "Accumulate gradients over the parts, average them over the processes, update."
    total = torch.zeros((), device=world.device)
    optimizer.announce_rows([batch[0] for batch in batches])
    for batch in batches:
        loss = forward(model, batch, world) / len(batches)
        optimizer.sparse.exchange_rows()
        loss.backward()
        total += loss.detach() / batch[0].numel()
    optimizer.step()
    return total


def training_loader(files: list[Path], recipe: Recipe, size: Size) -> TokenLoader:
    "The training tokens of a recipe in its order."
    bos = 256 if size.tokenizer == "bytes" else 50_256
    if recipe.batch_rows != PARTS:
        raise RunError(f"packed documents take one row for each of the {PARTS} parts, not {recipe.batch_rows} rows; "
                       "change seq_len instead of batch_rows")
    return DocumentLoader(files, recipe.seq_len, recipe.max_len, bos, aligned=True)


def validation_loader(files: list[Path], recipe: Recipe, size: Size) -> TokenLoader:
    "Validation tokens from the first on, cut anywhere."
    bos = 256 if size.tokenizer == "bytes" else 50_256
    # a validation shard that is too short for the recipe's parts gets shorter ones
    row_len = min(recipe.val_len, (read_header(files[0]) - 1) // PARTS // 128 * 128)
    return DocumentLoader(files, row_len, row_len, bos, aligned=False)


@torch.no_grad()
def validate(
    model: nn.Module,
    files: list[Path],  # validation shards
    recipe: Recipe,
    size: Size,
    world: World,
) -> float:  # mean cross-entropy in nats
    "Loss over the first `val_tokens` tokens of the validation split, the same rows for any number of processes."
    loader = validation_loader(files, recipe, size)
    available = sum(read_header(path) - 1 for path in files)  # the last token of a shard is only a target
    steps = max(1, min(size.val_tokens, available) // (loader.rows * loader.row_len))
    total = torch.zeros((), device=world.device)
    model.eval()
    for _ in range(steps):
        for batch in loader.next_step(world.parts):
            total += forward(model, batch, world)
    model.train()
    return world.average(total / (steps * len(world.parts))).item()


def compile_model(
    model: nn.Module,
) -> nn.Module:
    "The network compiled, for training and for evaluation; its graphs stay on disk, also with autograd functions."
    functorch_config.autograd_cache_allow_custom_autograd_functions = True
    return torch.compile(model, dynamic=False, fullgraph=True)


def total_steps(recipe: Recipe) -> int:
    "Scheduled steps, and those after them."
    return recipe.steps + recipe.extension


def set_step(
    step: int,
    model: nn.Module,  # not the compiled one
    optimizer: torch.optim.Optimizer,
    loader: TokenLoader,  # of the training tokens
    recipe: Recipe,
) -> None:
    "Bring everything that follows a schedule to a step: network, learning rates, momentum, size of the batch."
    factor = lr_factor(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        group["momentum"] = momentum_at(step, total_steps(recipe), recipe.momentum_warmup, recipe.momentum_cooldown)
    optimizer.step_number = step
    model.at_step(step)
    loader.row_len, loader.max_len = stage_batch(
        step, recipe.steps, recipe.seq_len, recipe.first_max_len, recipe.max_len)


def tokens_before(step: int, recipe: Recipe) -> int:
    "Training tokens of all steps before one."
    return staged_tokens(step, recipe.steps, PARTS * recipe.seq_len)


def warm_up(
    model: nn.Module,
    bare_model: nn.Module,  # the same one, not compiled
    optimizer: torch.optim.Optimizer,
    loader: TokenLoader,
    recipe: Recipe,
    world: World,
) -> None:
    "Compile and run every stage once on the first tokens, then restore weights, optimizer state and position."
    before, position = [p.detach().clone() for p in model.parameters()], loader.state()
    steps = [0, 1]  # tables step in odd steps only
    steps += stage_bounds(recipe.steps)
    for step in steps:
        set_step(step, bare_model, optimizer, loader, recipe)
        train_step(model, optimizer, loader.next_step(world.parts), world)
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)
    optimizer.zero_grad()
    optimizer.state.clear()
    optimizer.sparse.used.zero_()
    loader.open(**position)


@contextlib.contextmanager
def full_gpu_as_run_error() -> Iterator[None]:
    "A GPU without room ends a run like other failures: with one line that says what to do."
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"{str(error).split('. ')[0]}: stop other programs on this GPU, take a smaller size, or set "
                       "SPEEDRUN_REPLAY=0, with which training and validation share memory") from None


@full_gpu_as_run_error()
def train(
    recipe: Recipe,
    size: Size,
    run: Run,
    world: World,
    log: RunLog,
) -> float:  # final validation loss in nats
    "Train a recipe at a size; raises `DataError` or `RunError` with one line that says what to do."
    train_files, val_files = find_shards(run.data_dir, "train"), find_shards(run.data_dir, "val")
    loader = training_loader(train_files, recipe, size)
    loader = Prefetcher(loader, world.device)
    numbers = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    log.text(f"attention: {attention_backend(world.device.type, numbers)}")
    torch.manual_seed(run.seed)
    bare_model = build_model(recipe, size).to(world.device)
    model = compile_model(bare_model) if run.compile else bare_model
    if replays(world.device.type):
        model = Replay(model, bare_model, GraphRecorder())
    optimizer = build_optimizer(recipe, bare_model, run.compile)
    if run.compile:
        log.text("compiling the model and warming up kernels", console=True)
        warm_up(model, bare_model, optimizer, loader, recipe, world)
        validate(model, val_files, recipe, size, world)
        gc.collect()
        gc.freeze()  # the compiler's many objects live as long as the run: no need to look at them again

    identity = {"recipe": dataclasses.asdict(recipe), "size": size.name, "seed": run.seed, "rung": run.rung}
    start, watch = 0, Stopwatch(world.device)
    if run.resume:
        meta = load_checkpoint(run.run_dir / "checkpoint.safetensors", bare_model, optimizer, identity)
        loader.open(**meta["loader"])
        start, watch = meta["step"], Stopwatch(world.device, meta["train_time_ms"])
    log.record(start=start, world_size=world.size, device=str(world.device), torch=torch.__version__, **identity)

    def save(step: int) -> None:
        meta = identity | {"step": step, "loader": loader.state(), "train_time_ms": watch.before}
        save_checkpoint(run.run_dir / "checkpoint.safetensors", bare_model, optimizer, meta, world)

    steps = total_steps(recipe)
    with stop_signals() as caught:
        for step in range(start, steps + 1):
            set_step(step, bare_model, optimizer, loader, recipe)
            if step == steps:
                bare_model.long.fill_(FINAL_LONG * recipe.window_block)  # the last validation looks farther back
            if step == steps or (step % run.val_every == 0 and step > start) or step == 0:
                watch.pause()
                val_loss = validate(model, val_files, recipe, size, world)
                log.validation(step, steps, watch.before, tokens_before(step, recipe), val_loss)
                watch.go_on()
            if step == steps or (step % run.save_every == 0 and step > start):
                watch.pause()
                save(step)
                watch.go_on()
            if step == steps:
                return val_loss

            loss = train_step(model, optimizer, loader.next_step(world.parts), world)

            done = step + 1
            if done % run.log_every == 0 or done == steps:
                # one small exchange carries the loss and the wish to stop, so that all processes agree on both
                mean_loss, stop = world.average(torch.stack([loss, torch.full_like(loss, len(caught))])).tolist()
                if not math.isfinite(mean_loss):
                    raise RunError(f"the loss is {mean_loss} at step {done}; the last good checkpoint, if any, is in "
                                   f"{run.run_dir}. Likely causes: a learning rate that is too high, or damaged data")
                log.progress(done, steps, watch.read(), tokens_before(done, recipe), mean_loss)
                if stop and done < steps:
                    watch.pause()
                    save(done)
                    log.text(f"stopped by a signal after step {done}", console=True)
                    raise Interrupted(f"stopped after step {done}; continue with the same command and --resume")


def positive(text: str) -> int:
    "A whole number from 1 on, for argparse."
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def main(recipes: dict[str, Recipe], sizes: dict[str, Size], rung: str) -> None:
    "Command line of an exported script; run it directly or under torchrun."
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=list(recipes), default="full", help="nano runs on a laptop CPU")
    parser.add_argument("--data", type=Path, help="folder with *_train_*.bin and *_val_*.bin shards")
    parser.add_argument("--out", type=Path, help="folder for log and checkpoint")
    parser.add_argument("--steps", type=positive, help="train this many steps instead of the recipe's")
    parser.add_argument("--batch-rows", type=positive, help="rows per step instead of the recipe's")
    parser.add_argument("--val-every", type=positive, default=125)
    parser.add_argument("--save-every", type=positive, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    args = parser.parse_args()
    recipe, size = recipes[args.size], sizes[args.size]
    changes = {"steps": args.steps, "batch_rows": args.batch_rows}
    recipe = dataclasses.replace(recipe, **{k: v for k, v in changes.items() if v is not None})
    data_dir = args.data or Path(os.environ.get("DATA_PATH", ".")) / "data" / size.data
    script = Path(sys.argv[0])
    out = args.out or Path("runs") / f"{script.stem}-{size.name}-seed{args.seed}"
    try:
        world = join_world(args.device)
        run = Run(data_dir, out, args.seed, args.val_every, args.save_every,
                  log_every=10 if world.device.type == "cuda" else 1,
                  compile=world.device.type == "cuda", resume=args.resume, rung=rung)
        log = RunLog(out, world.rank, args.resume)
        log.text(script.read_text(encoding="utf-8"))
        log.text("=" * 100)
        log.text(f"Running Python {sys.version} and PyTorch {torch.__version__} on {world.size} x {world.device.type}")
        train(recipe, size, run, world, log)
        if world.device.type == "cuda":
            log.text(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB", console=True)
    except (DataError, RunError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(130 if isinstance(error, Interrupted) else 2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- the recipe at each size ---------------------------------------------------------------------

RECIPES = {
    "nano": Recipe(
        num_layers=11,
        num_heads=4,
        rotary_base=1024.0,
        softmax_scale=0.4,
        seq_len=256,
        batch_rows=8,
        steps=120,
        cooldown_frac=0.6,
        adam_lr=0.016,
        muon_lr=0.023,
        muon_momentum=0.95,
        normuon_beta2=0.9,
        adam_decay=0.005,
        muon_decay=1.2,
        bigram_size=8192,
        max_len=256,
        val_len=3840,
        window_block=16,
        first_max_len=112,
        extension=4,
        momentum_warmup=30,
        momentum_cooldown=6,
    ),
    "mini": Recipe(
        num_layers=11,
        num_heads=6,
        rotary_base=1024.0,
        softmax_scale=0.2,
        seq_len=4096,
        batch_rows=8,
        steps=1375,
        cooldown_frac=0.6,
        adam_lr=0.008,
        muon_lr=0.023,
        muon_momentum=0.95,
        normuon_beta2=0.9,
        adam_decay=0.005,
        muon_decay=1.2,
        bigram_size=251520,
        max_len=2048,
        val_len=65536,
        window_block=128,
        first_max_len=896,
        extension=10,
        momentum_warmup=300,
        momentum_cooldown=50,
    ),
    "full": Recipe(
        num_layers=11,
        num_heads=6,
        rotary_base=1024.0,
        softmax_scale=0.1,
        seq_len=16384,
        batch_rows=8,
        steps=1375,
        cooldown_frac=0.6,
        adam_lr=0.008,
        muon_lr=0.023,
        muon_momentum=0.95,
        normuon_beta2=0.9,
        adam_decay=0.005,
        muon_decay=1.2,
        bigram_size=251520,
        max_len=2048,
        val_len=262144,
        window_block=128,
        first_max_len=896,
        extension=10,
        momentum_warmup=300,
        momentum_cooldown=50,
    ),
}


if __name__ == "__main__":
    main(RECIPES, SIZES, "fused_rotary")
