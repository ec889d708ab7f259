"""What every script of the gallery is run with."""

import warnings
from typing import Any

import torch
import torch.utils.benchmark  # logs at its first import what it misses of CUDA: here, and not on a page

outside = warnings.catch_warnings()


def strict(gallery_conf: dict[str, Any], script: str, when: str) -> None:
    """Make warnings of a script errors, and use one thread, so that figures are the same wherever they are drawn."""
    global outside
    if when == "after":
        outside.__exit__(None, None, None)
        return
    outside = warnings.catch_warnings()
    outside.__enter__()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
