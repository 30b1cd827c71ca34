"""Small networks of any rung for tests."""

import torch
from torch import Tensor, nn

from speedrun_lib.recipe import LADDER
from speedrun_lib.runs import row_borders

NAMES = [rung.name for rung in LADDER]


def depth(rung: str, shallow: int) -> int:
    "Number of layers: rungs from `gated_skip` on name layers by number and need all eleven."
    return 11 if NAMES.index(rung) >= NAMES.index("gated_skip") else shallow


def row_logits(model: nn.Module, inputs_bt: Tensor) -> Tensor:
    "Logits of every row; packed networks take one row at a time."
    if not model.recipe.documents:
        return model.logits(inputs_bt)
    extra = row_borders(model.recipe, inputs_bt.shape[1])
    return torch.cat([model.logits(row[None], *extra) for row in inputs_bt])
