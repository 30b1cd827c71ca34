"""Train GPT-2 by all rungs of the ladder up to `paired_heads`, which adds:
in four layers, two heads share one softmax over the keys of both.

Rung `paired_heads` of the NanoGPT speedrun course (record 58); chapter nbs/42_offset_and_pairs.ipynb.
Made by `speedrun export paired_heads` from the course's notebooks: change those, not this file.

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
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
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

def trapezoid(
    progress: float,  # share of the run that is done, 0..1
    warmup_frac: float,  # share with a rising rate
    cooldown_frac: float,  # share with a falling rate, at the end; 0 = none
) -> float:  # factor on the peak learning rate
    "Linear warm-up, a plateau, linear cooldown to zero (record 2; Hägele et al. 2024, arXiv 2405.18392)."
    if progress < warmup_frac:
        return progress / warmup_frac
    return min(1.0, (1 - progress) / cooldown_frac) if cooldown_frac else 1.0


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
    warmup_frac: float = 700 / 19_560  # share of steps with a rising learning rate
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

    def make_banks(self, layers: int, d: int) -> None:
        "The matrices of all layers stacked by shape, so that the optimizer handles each shape in one call."
        with_attention = layers - 1
        shapes = (2 * with_attention, d, d), (2 * with_attention, d, d), (2 * layers, 4 * d, d)
        qk, vo, mlp = (uniform_weights(*shape) for shape in shapes)
        mlp[1::2] = 0
        qk = qk.view(-1, 2 * d // self.recipe.num_heads, d)
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
        q, k, v = qkv_bthk.chunk(3, dim=-2)
        q, k = norm_queries_keys(q, k)
        if layer in PAIRED_LAYERS:
            q, k = (rotate_pairs(x, self.rotary_cos, self.rotary_sin) for x in (q, k))
        else:
            q, k = (rotate(x, self.rotary_cos, self.rotary_sin) for x in (q, k))
        if layer in LONG_LAYERS:
            k = offset_keys(k)
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
        qk, vo = self.qk_bank.view(-1, *self.vo_bank.shape[1:]).unbind(), self.vo_bank.unbind()
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
            y_btd = relu2_mlp(rms_norm(x_btd), up_w=mlp[2 * i], down_w=mlp[2 * i + 1])
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
        z_btv = self.logits(inputs_bt, cu_seqlens, max_len).float()
        if self.training:
            return mtp_losses(z_btv, targets_bt, self.mtp_weights).sum()
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
            head.grad += embed.grad.T
            embed.grad = None
        groups = [group for group in self.due() if group["params"][0].grad is not None]
        for group in groups:
            p = group["params"][0]
            share, grad = p, p.grad
            if group["rule"] == "muon":
                self.step_muon(share, grad, self.state[p], group)
            else:
                self.step_adam(share, grad, self.state[p], group)
            p.grad = None
        if tied:
            embed.copy_(head.T)
            if self.step_number == split:
                state = transposed_state(self.state[head])
                self.state[embed] = state

    def whole_state(self, p: Tensor) -> dict[str, Tensor]:
        "State of a parameter, from all processes; every process has to ask."
        return self.state[p]

    def set_state(self, p: Tensor, state: dict[str, Tensor]) -> None:
        "Put what `whole_state` gave in place, for any number of processes."
        self.state[p] = state

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
        shape_factor = math.sqrt(max(1, p.shape[-2] / p.shape[-1]))
        decay = self.recipe.muon_decay * group["lr"] * group["decay"]
        numbers = torch.tensor([group["momentum"], group["lr"] * shape_factor, decay])
        self.move_muon(p, grad, state, self.matrix_factors(p, group), *numbers.unbind())

    def matrix_factors(self, p: Tensor, group: dict) -> Tensor:
        "A factor on the learning rate of each matrix of a bank, or of this process's share of it, (n, 1, 1)."
        factors = torch.ones(len(group["params"][0]), 1, 1)
        factors[1::2] = group["lr_odd"]
        return factors.to(p.device, non_blocking=True)

    def muon(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], factors: Tensor, momentum: Tensor, lr: Tensor,
             decay: Tensor) -> None:
        "Muon's rule."
        update = nesterov(state["momentum_buffer"], grad.float(), momentum)
        update = polar_express(update)
        update = equalise(update, state, self.recipe.normuon_beta2)
        old = p
        new = old - update * (lr * factors)
        new -= cautious_decay(old, update, strict=False) * (decay * lr * factors)
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
    progress = (step + 0.5) / recipe.steps
    return trapezoid(progress, recipe.warmup_frac, recipe.cooldown_frac)


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
    with torch.autocast("cuda", torch.bfloat16, enabled=world.device.type == "cuda"):
        return model(*batch)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, ...]],  # this process's parts
    world: World,
) -> Tensor:  # mean loss of this process's parts, a scalar on the device
    "Accumulate gradients over the parts, average them over the processes, update."
    total = torch.zeros((), device=world.device)
    for batch in batches:
        loss = forward(model, batch, world) / len(batches)
        loss.backward()
        total += loss.detach() / batch[0].numel()
    for group in optimizer.due():
        world.average(group["params"][0].grad)
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
    return recipe.steps


def set_step(
    step: int,
    model: nn.Module,  # not the compiled one
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
) -> None:
    "Bring everything that follows a schedule to a step: network, learning rates, momentum, size of the batch."
    factor = lr_factor(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    optimizer.step_number = step
    model.at_step(step)


def tokens_before(step: int, recipe: Recipe) -> int:
    "Training tokens of all steps before one."
    return step * recipe.batch_rows * recipe.seq_len


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
        set_step(step, bare_model, optimizer, recipe)
        train_step(model, optimizer, loader.next_step(world.parts), world)
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)
    optimizer.zero_grad()
    optimizer.state.clear()
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
            set_step(step, bare_model, optimizer, recipe)
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
        warmup_frac=0.0,
        cooldown_frac=0.4,
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
    ),
    "mini": Recipe(
        num_layers=11,
        num_heads=6,
        rotary_base=1024.0,
        softmax_scale=0.2,
        seq_len=4096,
        batch_rows=8,
        steps=3000,
        warmup_frac=0.0,
        cooldown_frac=0.4,
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
    ),
    "full": Recipe(
        num_layers=11,
        num_heads=6,
        rotary_base=1024.0,
        softmax_scale=0.1,
        seq_len=16384,
        batch_rows=8,
        steps=5100,
        warmup_frac=0.0,
        cooldown_frac=0.28431372549019607,
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
    ),
}


if __name__ == "__main__":
    main(RECIPES, SIZES, "paired_heads")
