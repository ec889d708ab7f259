"""Tiny tensors of a few levels are full of zeros, ties and floors; tests of something else do not hear of it."""

import warnings

import pytest

WORDS = ("Zeros without a mask", ".* score the same at the cut", ".* is all that is left of the")
unwarned = [pytest.mark.filterwarnings(f"ignore:{words}:UserWarning") for words in WORDS]


def ignore():
    """Leave these warnings out of those that are recorded from here on."""
    for words in WORDS:
        warnings.filterwarnings("ignore", words, UserWarning)
