"""Train GPT-2 by all rungs of the ladder up to `softcap`, which adds:
logits bent into a fixed range.

Rung `softcap` of the NanoGPT speedrun course (records 9, 18, 54); chapter nbs/14_logits.ipynb.
Made by `speedrun export softcap` from the course's notebooks: change those, not this file.

    torchrun --standalone --nproc_per_node=8 FILE        8 GPUs; 1, 2 and 4 work as well
    python FILE --size nano --data data/demo_bytes       a laptop CPU

Data: `speedrun data get fineweb --shards N` or `speedrun data get demo` (llm.c's .bin format).
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
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


PARTS = 8  # micro-batches per step over all processes; 8 GPUs take one each


class TokenLoader:
    "Deterministic batches of (inputs, targets) from shards, the same for every number of processes."

    def __init__(
        self,
        files: list[Path],  # shards in reading order
        rows: int,  # rows per step over all processes, a multiple of 8
        row_len: int,  # tokens per row
    ):
        self.files, self.rows, self.row_len = files, rows, row_len
        if rows % PARTS:
            raise ValueError(f"{rows} rows per step cannot be dealt to {PARTS} parts; use a multiple of {PARTS}")
        self.open(shard=0, cursor=0)

    def open(self, shard: int, cursor: int) -> None:
        "Continue at document or token `cursor` of a shard."
        self.shard, self.cursor = shard % len(self.files), cursor
        self.tokens = read_shard(self.files[self.shard])

    def state(self) -> dict[str, int]:
        "Position of the next step: pass it to `open` to continue there."
        return {"shard": self.shard, "cursor": self.cursor}

    def pieces(self) -> list[list[tuple[int, int]]]:
        "Where each row of a step lies on the current shard; moves the cursor only when all rows are found."
        length, cursor, rows = self.row_len + 1, self.cursor, []
        for _ in range(self.rows):
            if cursor + length > len(self.tokens):
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


# ---- 02_baseline ---------------------------------------------------------------------------------

def decay_groups(
    model: nn.Module,  # any network
    weight_decay: float,  # decay of matrices; vectors (biases, gains) get none
) -> list[dict]:  # two parameter groups for AdamW
    "Split parameters into matrices, which decay, and vectors, which do not."
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


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


def causal_attention(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthk: Tensor,
    softmax_scale: float | None = None,  # factor on the scores; None = 1/sqrt(k)
) -> Tensor:  # (b, t, h, k)
    "What every position gathers from itself and the past."
    q, k, v = (y_bthk.transpose(1, 2) for y_bthk in (q_bthk, k_bthk, v_bthk))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale).transpose(1, 2)


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
    adam_beta1: float = 0.9  # AdamW's first-moment decay
    adam_beta2: float = 0.95  # AdamW's second-moment decay
    weight_decay: float = 0.1  # AdamW's decoupled decay, matrices only
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping


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
        positions = recipe.seq_len
        cos_tk, sin_tk = rotary_table(self.frequencies, positions)
        self.register_buffer("rotary_cos", cos_tk, persistent=False)
        self.register_buffer("rotary_sin", sin_tk, persistent=False)
        self.make_banks(layers, d)
        self.make_streams(layers, d, vocab_size)

    def make_banks(self, layers: int, d: int) -> None:
        "The matrices of all layers stacked by shape, so that the optimizer handles each shape in one call."
        with_attention = layers
        shapes = (2 * with_attention, d, d), (2 * with_attention, d, d), (2 * layers, 4 * d, d)
        qk, vo, mlp = (uniform_weights(*shape) for shape in shapes)
        mlp[1::2] = 0
        self.qk_bank, self.vo_bank, self.mlp_bank = nn.Parameter(qk), nn.Parameter(vo), nn.Parameter(mlp)

    def make_streams(self, layers: int, d: int, vocab_size: int) -> None:
        "The small parameters and the tables beside the blocks."

    def attention(self, a_btd: Tensor, layer: int, matrices: tuple[Tensor, ...], extra_v: Tensor | None = None,
                  gate_w: Tensor | None = None, cu_seqlens: Tensor | None = None,
                  max_len: Tensor | None = None) -> Tensor:
        "What one layer's attention gathers, (b, t, h, k); the matrices of queries, keys and values are (d, d)."
        qkv_bthk = split_heads(a_btd, torch.cat(matrices), 3 * self.recipe.num_heads)
        q, k, v = qkv_bthk.chunk(3, dim=-2)
        q, k = norm_queries_keys(q, k)
        q, k = (rotate(x, self.rotary_cos, self.rotary_sin) for x in (q, k))
        y = causal_attention(q, k, v, self.recipe.softmax_scale)
        return y

    def hidden(self, inputs_bt: Tensor, cu_seqlens: Tensor | None = None, max_len: Tensor | None = None) -> Tensor:
        "What the head reads, (b, t, d)."
        x_btd = F.embedding(inputs_bt, self.embed)  # compiled, its gradient adds up in fp32; that of indexing in bf16
        x_btd = rms_norm(x_btd)
        qk, vo = self.qk_bank.view(-1, *self.vo_bank.shape[1:]).unbind(), self.vo_bank.unbind()
        mlp = self.mlp_bank.unbind()
        for i in range(self.recipe.num_layers):
            n = i  # number among the layers with attention
            qkv_w, o_w = torch.cat([*qk[2 * n : 2 * n + 2], vo[2 * n]]), vo[2 * n + 1]
            a_btd = rms_norm(x_btd)
            extra_v = None
            gate_w = None
            y_bthk = self.attention(a_btd, i, qkv_w.chunk(3), extra_v, gate_w, cu_seqlens, max_len)
            y_btd = F.linear(y_bthk.flatten(2), o_w)
            x_btd = x_btd + y_btd
            y_btd = relu2_mlp(rms_norm(x_btd), up_w=mlp[2 * i], down_w=mlp[2 * i + 1])
            x_btd = x_btd + y_btd
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
        return F.cross_entropy(z_btv.flatten(0, 1), targets_bt.flatten())


def build_model(recipe: Recipe, size: Size) -> nn.Module:
    "The network of a recipe at a size, with fresh weights from torch's global generator."
    return GPT(recipe, size)


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


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    "PyTorch's AdamW, or from the rung `muon` on the optimizer that grows."
    groups = decay_groups(model, recipe.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.adam_lr, betas=(recipe.adam_beta1, recipe.adam_beta2), fused=True)


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
        state = optimizer.state[p]
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
        # AdamW's step counter stays where it was: on the parameter's device when fused
        optimizer.state[p] = {k: v.to(p.device) for k, v in state.items()}
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
    recipe: Recipe,
    world: World,
) -> Tensor:  # mean loss of this process's parts, a scalar on the device
    "Accumulate gradients over the parts, average them over the processes, update."
    total = torch.zeros((), device=world.device)
    for batch in batches:
        loss = forward(model, batch, world) / len(batches)
        loss.backward()
        total += loss.detach()
    for p in model.parameters():
        world.average(p.grad)
    if recipe.grad_clip:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return total


def training_loader(files: list[Path], recipe: Recipe) -> TokenLoader:
    "The training tokens of a recipe in its order."
    return TokenLoader(files, recipe.batch_rows, recipe.seq_len)


def validation_loader(files: list[Path], recipe: Recipe) -> TokenLoader:
    "Validation tokens from the first on, cut anywhere."
    return TokenLoader(files, recipe.batch_rows, recipe.seq_len)


@torch.no_grad()
def validate(
    model: nn.Module,
    files: list[Path],  # validation shards
    recipe: Recipe,
    size: Size,
    world: World,
) -> float:  # mean cross-entropy in nats
    "Loss over the first `val_tokens` tokens of the validation split, the same rows for any number of processes."
    loader = validation_loader(files, recipe)
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
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
) -> None:
    "Bring everything that follows a schedule to a step: network, learning rates, momentum, size of the batch."
    factor = lr_factor(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def tokens_before(step: int, recipe: Recipe) -> int:
    "Training tokens of all steps before one."
    return step * recipe.batch_rows * recipe.seq_len


def warm_up(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: TokenLoader,
    recipe: Recipe,
    world: World,
) -> None:
    "Compile and run every stage once on the first tokens, then restore weights, optimizer state and position."
    before, position = [p.detach().clone() for p in model.parameters()], loader.state()
    steps = [0]  # tables step in odd steps only
    for step in steps:
        set_step(step, optimizer, recipe)
        train_step(model, optimizer, loader.next_step(world.parts), recipe, world)
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
    loader = training_loader(train_files, recipe)
    torch.manual_seed(run.seed)
    bare_model = build_model(recipe, size).to(world.device)
    model = compile_model(bare_model) if run.compile else bare_model
    optimizer = build_optimizer(recipe, bare_model)
    if run.compile:
        log.text("compiling the model and warming up kernels", console=True)
        warm_up(model, optimizer, loader, recipe, world)
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
            set_step(step, optimizer, recipe)
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

            loss = train_step(model, optimizer, loader.next_step(world.parts), recipe, world)

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
        softmax_scale=0.48,
        seq_len=256,
        batch_rows=8,
        steps=120,
        warmup_frac=0.25,
        cooldown_frac=0.4,
        adam_lr=0.008,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        grad_clip=1.0,
    ),
    "mini": Recipe(
        num_layers=11,
        num_heads=6,
        rotary_base=1024.0,
        softmax_scale=0.24,
        seq_len=512,
        batch_rows=64,
        steps=3000,
        warmup_frac=0.026845637583892617,
        cooldown_frac=0.4,
        adam_lr=0.0025,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        grad_clip=1.0,
    ),
    "full": Recipe(
        num_layers=11,
        num_heads=6,
        rotary_base=1024.0,
        softmax_scale=0.12,
        seq_len=1024,
        batch_rows=512,
        steps=9536,
        warmup_frac=0.026845637583892617,
        cooldown_frac=0.21476510067114093,
        adam_lr=0.0018,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        grad_clip=1.0,
    ),
}


if __name__ == "__main__":
    main(RECIPES, SIZES, "softcap")
