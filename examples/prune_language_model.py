"""Remove a part of the hidden units of a small language model without training it, and see what its text loses.

Prunes the columns of the 30 down projections of SmolLM2-135M-Instruct, so that what feeds them is dead, and re-fits all
210 linear layers in the same pass, on 64 blocks of 256 tokens of Python's own help topics. Prints the perplexity on 48
other blocks, the seconds that pruning took, and tokens per second; with ``--compact`` also those of the small model
that is left when the dead units are cut.

    pip install "torchprune-ext[language-model]"
    python examples/prune_language_model.py --fraction 0.25 [--compact]
    python examples/prune_language_model.py --fraction 0.25 --criterion wanda
    python examples/prune_language_model.py --fraction 0.25 --criterion magnitude --no-refit
"""

from __future__ import annotations

import sys
import time

import torch
from language_model import REPORTED, batches, blocks, load, options, perplexity, trunk
from torch import Tensor, nn
from torch.nn.utils import prune

import torchprune_ext as tpe

# --- pruning --------------------------------------------------------------------------------------


def prune_units(model: nn.Module, tokens: Tensor, fraction: float, criterion: str, *, refit: bool) -> None:
    """Prune a ``fraction`` of the columns of every down projection, and re-fit all linear layers."""
    down = [(module, "weight") for name, module in model.named_modules() if name.endswith("down_proj")]
    if not refit:
        for module, name in down:
            prune.ln_structured(module, name, fraction, n=2, dim=1)
        return
    params = tpe.prunable_parameters(trunk(model), types=nn.Linear)
    tpe.prune_and_compensate(
        trunk(model),
        batches(tokens),
        params,
        target_sparsity=fraction,
        unit=dict.fromkeys(down, tpe.Channel(dim=1)),
        criterion=criterion,
    )


def main() -> None:
    """Print a row for each model."""
    parser = options(__doc__)
    parser.add_argument("--fraction", type=float, default=0.25, help="of the hidden units that go")
    parser.add_argument("--criterion", default="obs", choices=["obs", "admm", "wanda", "magnitude"])
    parser.add_argument("--no-refit", action="store_true", help="prune by magnitude and leave the rest as it is")
    parser.add_argument("--compact", action="store_true", help="cut what is dead, and measure the small model")
    given = parser.parse_args()
    if given.no_refit and given.criterion != "magnitude":
        parser.error("--no-refit is for --criterion magnitude")
    torch.set_num_threads(given.threads)
    model, tokenizer = load(given.model, given.gguf)
    tokens = blocks(tokenizer)
    told = tokens[-REPORTED:]
    print(f"{len(tokens)} blocks, {given.blocks} to calibrate on, {len(told)} to report\n")
    print(f"{'':<34}{'perplexity':>14}{'tokens / s':>12}{'parameters':>14}{'pruning':>10}")

    def row(name: str, model: nn.Module, seconds: float | None = None) -> None:
        found, speed = perplexity(model, told)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        cells = f"{name:<34}{found:>14,.2f}{speed:>12,.0f}{count:>12.1f} M"
        print(cells if seconds is None else f"{cells}{seconds:>8.0f} s", flush=True)

    row("dense", model)
    start = time.perf_counter()
    prune_units(model, tokens[: given.blocks], given.fraction, given.criterion, refit=not given.no_refit)
    seconds = time.perf_counter() - start
    tpe.remove_all(model)
    row(f"{given.criterion}{', re-fitted' * (not given.no_refit)}, {given.fraction:.0%}", model, seconds)
    if given.compact:
        start = time.perf_counter()
        small = tpe.compact(model, batches(told[:1])[0])
        row("the same, compacted", small, time.perf_counter() - start)


if __name__ == "__main__":
    try:
        main()
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
