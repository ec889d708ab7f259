"""Handwritten digits for the examples.

Two sources, both as normalised 28x28 images: scikit-learn's own (1,797 real digits that ship with that package, so
nothing is downloaded) and a folder with MNIST.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels; the usual normalisation for this network


@dataclass(frozen=True)
class LabelledImages:
    """Normalised images, shape (count, 1, 28, 28), and their labels, shape (count,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def subset(self, count: int, seed: int) -> "LabelledImages":
        """Return ``count`` of them (or all, if there are fewer) in random order, the same for the same ``seed``."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return LabelledImages(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Digits:
    """A data set: its name, its training part (``None`` where a folder has none) and its test part."""

    name: str
    train: LabelledImages | None
    test: LabelledImages


def load_sklearn_digits() -> Digits:
    """Return scikit-learn's digits, scaled from 8x8 to 28x28, split once and for all into 75 % and 25 % by class.

    Returns:
        1,347 training and 450 test images.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("scikit-learn is not installed: pip install torchprune-ext[demo]") from error
    pixels, labels = load_digits(return_X_y=True)  # values from 0 to 16
    small = torch.from_numpy(pixels).float().div(16).view(-1, 1, 8, 8)
    images = F.interpolate(small, size=(28, 28), mode="bilinear")
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    everything = _labelled(images, torch.from_numpy(labels))
    parts = [LabelledImages(everything.images[rows], everything.labels[rows]) for rows in (train, test)]
    return Digits("scikit-learn's digits", train=parts[0], test=parts[1])


def load_mnist(folder: Path) -> Digits:
    """Return the MNIST digits of ``folder``.

    Each part is taken from the first that exists: the IDX files ``<part>-images-idx3-ubyte`` and
    ``<part>-labels-idx1-ubyte``, plain or as ``.gz``, in the folder itself or in ``MNIST/raw`` (torchvision's layout);
    or ``<part>*.npz`` with the arrays ``x`` and ``y``. The parts are called ``train`` and ``t10k``.

    Args:
        folder: where the files are; nothing is downloaded.

    Returns:
        The digits; ``train`` is ``None`` where the folder has no training images.

    Raises:
        FileNotFoundError: the folder has no test images.
    """
    test = _load_part(folder, "t10k")
    if test is None:
        raise FileNotFoundError(
            f"no MNIST test images in {folder}: expected t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (or .gz) "
            "there or in its MNIST/raw, or t10k*.npz with the arrays x and y"
        )
    return Digits("MNIST", train=_load_part(folder, "train"), test=test)


def _labelled(images: Tensor, labels: Tensor) -> LabelledImages:
    """Return the two together; ``images`` hold values from 0 to 1 and get normalised."""
    return LabelledImages(((images - MEAN) / STD).contiguous(), labels.long())


def _load_part(folder: Path, part: str) -> LabelledImages | None:
    """Return the ``part`` ("train" or "t10k") of MNIST in ``folder``, or ``None`` if it is not there."""
    for place in (folder, folder / "MNIST" / "raw"):
        for suffix in ("", ".gz"):
            images = place / f"{part}-images-idx3-ubyte{suffix}"
            labels = place / f"{part}-labels-idx1-ubyte{suffix}"
            if images.is_file() and labels.is_file():
                return _from_bytes(_read_idx(images), _read_idx(labels))
    for file in sorted(folder.glob(f"{part}*.npz")):
        with np.load(file) as arrays:
            return _from_bytes(arrays["x"], arrays["y"])
    return None


def _read_idx(file: Path) -> np.ndarray:
    """Return the array of bytes in an IDX file: a zero, a zero, a type (8: bytes), the number of axes, their sizes."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{file} is not an IDX file of bytes: it starts with {content[:4]!r}")
    axes = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=axes, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


def _from_bytes(images: np.ndarray, labels: np.ndarray) -> LabelledImages:
    """Return images of bytes from 0 to 255, shape (count, 28, 28), with their labels."""
    return _labelled(torch.tensor(images).unsqueeze(1).float().div(255), torch.tensor(labels))
