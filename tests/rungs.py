"""Small networks of any rung for tests."""

import torch
from torch import Tensor, nn

from speedrun_lib.recipe import LADDER

NAMES = [rung.name for rung in LADDER]


def depth(rung: str, shallow: int) -> int:
    "Number of layers: rungs from `gated_skip` on name layers by number and need all eleven."
    return 11 if NAMES.index(rung) >= NAMES.index("gated_skip") else shallow


def row_args(recipe, length: int) -> tuple[Tensor, ...]:
    "What a network wants beside the tokens of a row that holds one document."
    if not recipe.documents:
        return ()
    return torch.tensor([0, length, length], dtype=torch.int32), torch.tensor(length, dtype=torch.int32)


def row_logits(model: nn.Module, inputs_bt: Tensor) -> Tensor:
    "Logits of every row; packed networks take one row at a time."
    if not model.recipe.documents:
        return model.logits(inputs_bt)
    extra = row_args(model.recipe, inputs_bt.shape[1])
    return torch.cat([model.logits(row[None], *extra) for row in inputs_bt])
