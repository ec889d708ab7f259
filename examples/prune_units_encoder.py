"""Remove half of the hidden units of a real sentence encoder, and some of its heads, without training it.

Prunes the columns of all-MiniLM-L6-v2 that read hidden units and heads, and re-fits all 36 linear layers in the same
pass, on 512 sentences; then compares the embeddings of 1,000 other sentences with the dense encoder's, as
``prune_encoder.py`` does. With ``--compact`` the dead units are cut, and the small encoders are measured against the
dense one: parameters, MACs, latency of 8 short sentences.

    pip install "torchprune-ext[encoder]"
    python examples/prune_units_encoder.py [--criteria] [--compact] [--model NAME_OR_FOLDER]
"""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

from prune_encoder import batches, counted, embed, load, neighbours, parser
from torch import nn

import torchprune_ext as tpe

Key = tuple[nn.Module, str]


def hidden_units(model: Any, share: float) -> dict[Key, tuple[tpe.Channel, float]]:
    """Return the tensors that read the hidden units of a BERT-like encoder, what one unit is in them, and the share."""
    return {(layer.output.dense, "weight"): (tpe.Channel(dim=1), share) for layer in model.encoder.layer}


def heads(model: Any, share: float) -> dict[Key, tuple[tpe.Channel, float]]:
    """Return the tensors that read the heads, and the same."""
    unit = tpe.Channel(dim=1, size=model.config.hidden_size // model.config.num_attention_heads)
    return {(layer.attention.output.dense, "weight"): (unit, share) for layer in model.encoder.layer}


WAYS = {
    "half of the hidden units": lambda model: hidden_units(model, 0.5),
    "half of the heads": lambda model: heads(model, 0.5),
    "half of the units, a quarter of the heads": lambda model: hidden_units(model, 0.5) | heads(model, 0.25),
}


def pruned(dense: nn.Module, data: list[Any], way: str, criterion: str) -> tuple[nn.Module, float]:
    """Return a pruned copy of ``dense``, and the seconds it took."""
    model = copy.deepcopy(dense)
    start, found = time.perf_counter(), WAYS[way](model)
    tpe.prune_and_compensate(
        model,
        data,
        tpe.prunable_parameters(model.get_submodule("encoder"), types=nn.Linear),  # all are re-fitted
        target_sparsity={key: share for key, (_, share) in found.items()},
        unit={key: unit for key, (unit, _) in found.items()},
        criterion=criterion,
        sample_mask=counted,
        progress=sys.stderr.isatty(),
    )
    return model, time.perf_counter() - start


def main() -> None:
    """Print a row for each way, and what is gained when the dead units are cut."""
    known = parser(__doc__)
    known.add_argument("--criteria", action="store_true", help="by all criteria, not by the default only")
    known.add_argument("--compact", action="store_true", help="cut what is dead, and measure what that gains")
    options = known.parse_args()
    model, tokenizer, calibration, told = load(options)
    test = batches(told, tokenizer)
    dense = embed(model, test)
    print(f"{'':<56}{'cosine':>8}{'neighbour':>11}{'pruning':>10}")
    small = {"dense": model}
    for way in WAYS:
        for criterion in ("obs", "admm", "wanda", "magnitude") if options.criteria else ("obs",):
            found, seconds = pruned(model, calibration, way, criterion)
            embeddings = embed(found, test)
            cosine = float((embeddings * dense).sum(1).mean())
            same = float((neighbours(embeddings) == neighbours(dense)).float().mean())
            print(f"{f'{way}, {criterion}':<56}{cosine:>8.4f}{same:>11.3f}{seconds:>8.0f} s", flush=True)
            if options.compact and criterion == "obs":
                small[way] = tpe.compact(found, test[0])
    if options.compact:
        print(tpe.compare(small, batches(told[:8], tokenizer)[0]))


if __name__ == "__main__":
    try:
        main()
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
