"""Prune the weights of a small language model, one by one or 2 of 4, without training it, and see what its text loses.

Prunes the 210 linear layers of SmolLM2-135M-Instruct by each way of the library, the same share of every row, on 64
blocks of 256 tokens of Python's own help topics, and prints the perplexity on 48 other blocks, the seconds, and the
most resident memory that the process had while it pruned, with the model and Python itself. Every cell is measured in a
process of its own. ``--other`` also reports on text of another kind, source code of Python's library, which none of
them is calibrated on. ``--validation`` reports on other blocks, to choose hyperparameters by.

    pip install "torchprune-ext[language-model]"
    python examples/sparse_language_model.py [--columns 50% 2:4 60% 70%] [--rows SparseGPT admm] [--other]
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from goals import GOALS, Goal, Params, asked, by_rows
from language_model import REPORTED, batches, blocks, find, load, options, perplexity, some, source_blocks, trunk
from measure import in_fresh_process, peak_megabytes
from torch import Tensor, nn

import torchprune_ext as tpe

Data = list[dict[str, Any]]
Way = Callable[[nn.Module, Data, Params, Goal], object]
REFINED, EPOCHS, RATE = 4, 5, 3e-5  # of refining: blocks of a step, epochs, learning rate


# --- the ways to prune ----------------------------------------------------------------------------


def magnitude(_: nn.Module, __: Data, params: Params, goal: Goal) -> None:
    by_rows(params, goal)


def wanda(model: nn.Module, data: Data, params: Params, goal: Goal) -> None:
    by_rows(params, goal, tpe.calibration.activations(trunk(model), data, params, progress=False))


def sparsegpt(model: nn.Module, data: Data, params: Params, goal: Goal) -> object:
    return tpe.sparsegpt(trunk(model), data, params, progress=False, **asked(goal))


def fitted(criterion: str, **more: Any) -> Way:
    """Return the way that chooses by ``criterion`` and re-fits."""
    return lambda model, data, params, goal: tpe.prune_and_compensate(
        trunk(model), data, params, criterion=criterion, progress=False, **asked(goal), **more
    )


def divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """Return the mean over the tokens of the Kullback-Leibler divergence from the dense model's next tokens."""
    found, wanted = (each.flatten(0, -2).log_softmax(-1) for each in (logits, dense))
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean")


def refined(model: nn.Module, data: Data, params: Params, goal: Goal) -> object:
    """Choose by ADMM, re-fit, and fit all that is left to the dense model's next tokens.

    The last eighth of the data is kept from both: what has been fitted to does not tell what gets better elsewhere.
    """
    dense, seen = copy.deepcopy(model), max(len(data) * 7 // 8, 1)
    fitted("admm")(model, data[:seen], params, goal)
    few, others = (
        [{**batch, "input_ids": part} for batch in part_of for part in batch["input_ids"].split(REFINED)]
        for part_of in (data[:seen], data[seen:] or data)
    )
    return tpe.refine(
        model,
        few,
        [model],
        dense=dense,
        epochs=EPOCHS,
        held_out=others,
        optimizer=adam,
        loss=divergence,
        progress=False,
    )


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.98))


# A row is a name and what prunes.
WAYS: dict[str, Way] = {
    "magnitude": magnitude,
    "Wanda": wanda,
    "SparseGPT": sparsegpt,
    "Wanda, re-fitted": fitted("wanda"),
    "admm": fitted("admm"),
    "admm, shares by output": fitted("admm", allocation="auto"),
    "admm, refined": refined,
}


# --- the table ------------------------------------------------------------------------------------


def measure(way: str | None, column: str | None, given: argparse.Namespace) -> dict[str, float]:
    """Return what is reported of one way of pruning, or of the dense model; run in a process of its own."""
    model, tokenizer = load(given.model, given.gguf)
    model.to(given.device)
    data, found = batches(blocks(tokenizer)[: given.blocks].to(given.device)), {}
    if way is not None and column is not None:
        params = tpe.prunable_parameters(trunk(model), types=nn.Linear)
        start = time.perf_counter()
        found["MB"] = peak_megabytes(lambda: WAYS[way](model, data, params, GOALS[column]), given.device)
        found["seconds"] = time.perf_counter() - start
        tpe.remove_all(model)
    texts = {"help": blocks(tokenizer)} | ({"source": source_blocks(tokenizer)} if given.other else {})
    return found | {
        name: perplexity(model, some(tokens, validation=given.validation).to(given.device))[0]
        for name, tokens in texts.items()
    }


def told(name: str, cells: dict[str, float]) -> str:
    """Return a row of the table."""
    pieces = [f"{name:<34}", *(f"{cells[text]:>13,.2f}" for text in ("help", "source") if text in cells)]
    if "seconds" in cells:
        pieces.append(f"{cells['seconds']:>9,.0f} s{cells['MB']:>10,.0f} MB")
    return "".join(pieces)


def header(given: argparse.Namespace) -> str:
    """Return what is measured, and the names of the columns."""
    folder, file = find(given.model, given.gguf)
    bits = re.search(r"Q(\d)", file or "")
    lines = [f"{Path(folder).name}; torch {torch.__version__}, {given.threads} threads"]
    if file is not None:
        rounded = "" if bits is None else f", rounded to {bits[1]} bits"
        lines.append(f"the dense reference has the weights of {file}{rounded}")
    which = "others than are reported, to choose by" if given.validation else "that nothing has seen"
    lines.append(f"{given.blocks} blocks of help topics to calibrate on; perplexity on {REPORTED} blocks {which}")
    names = "".join(f"{name:>13}" for name in ["help topics", *["source code"] * given.other])
    return "\n".join([*lines, "", f"{'':<34}{names}{'pruning':>11}{'peak memory':>13}"])


def main() -> None:
    """Print a row for each way and column."""
    parser = options(__doc__)
    parser.add_argument("--columns", nargs="+", default=list(GOALS), choices=list(GOALS), help="how much goes")
    parser.add_argument("--rows", nargs="+", default=list(WAYS), choices=list(WAYS), help="by which ways")
    parser.add_argument("--other", action="store_true", help="report on text of another kind too")
    parser.add_argument("--validation", action="store_true", help="report on other blocks, to choose by")
    parser.add_argument("--cell", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.cell is not None:
        print(json.dumps(measure(*(given.cell or (None, None)), given)))
        return
    print(header(given))
    same = [
        f"--{name}={getattr(given, name)}"
        for name in ("model", "gguf", "blocks", "threads", "device")
        if getattr(given, name)
    ]
    same += [f"--{name}" for name in ("other", "validation") if getattr(given, name)]

    def row(name: str, *cell: str) -> None:
        output = in_fresh_process(__file__, *same, "--cell", *cell)
        print(told(name, json.loads(output.splitlines()[-1])), flush=True)

    row("dense")
    for column in given.columns:
        for way in given.rows:
            if "shares" not in way or isinstance(GOALS[column], float):  # a pattern leaves none to choose
                row(f"{way}, {column}", way, column)


if __name__ == "__main__":
    try:
        main()
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
