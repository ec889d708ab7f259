"""Prune a trained network without training it: the chapter's LeNet, what is left re-fitted to the dense outputs.

Prunes all five weights by magnitude, by Fisher information and by Gauss-Newton curvature, once with the chapter's
sparsity for each layer and then with one threshold for the whole network; as they are, re-fitted, pruned and re-fitted
in rounds, and with ``--all`` refined after that. Then keeps 2 of 4. No labels are fitted to, but 5,000 training digits
are seen:

    python examples/compensate_mnist.py --mnist DIR --checkpoint model.pt

How many rounds, and that the inputs of the dense network do not count here (``dense_inputs=0``), is chosen by the
accuracy on training digits that are not among the 5,000, never on the test images.
Without ``--mnist`` and ``--checkpoint`` it trains a LeNet on scikit-learn's digits first.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import LabelledImages, load_mnist, load_sklearn_digits
from lenet import CHAPTER_AMOUNTS, LeNet, accuracy, dense_network, progress
from torch import Tensor, nn

import torchprune_ext as tpe
from torchprune_ext import calibration

CALIBRATION_IMAGES, BATCH = 5_000, 500
SPARSITIES = (0.7387, 0.90, 0.95, 0.98)  # the first is what the chapter's amounts leave of all parameters
ROUNDS = (5, 15)  # to choose from
REFINING = 20  # epochs
FITTED = {"dense_inputs": 0, "progress": False}  # of 0, 0.1, 0.3 and 1 the best on the training digits held out

Scores = dict[tuple[nn.Module, str], Tensor]
Goal = float | Mapping[str, float]  # of all weights together, or of each layer


@dataclass(frozen=True)
class Task:
    """The dense network and its data."""

    model: LeNet
    loader: list[tuple[Tensor, Tensor]]
    held_out: LabelledImages
    test: LabelledImages

    def network(self) -> tuple[LeNet, list[tuple[nn.Module, str]]]:
        """Return a copy of the dense network and its weights."""
        model = copy.deepcopy(self.model)
        return model, [(model.get_submodule(path), "weight") for path in CHAPTER_AMOUNTS]


@dataclass(frozen=True)
class Result:
    """What a way of pruning came to."""

    test: float
    held_out: float = 0.0
    seconds: float = 0.0
    rounds: int = 0


# --- what to drop ---------------------------------------------------------------------------------


def magnitude(model: nn.Module, task: Task) -> Scores:
    """Return the size of each weight."""
    return {(module, name): getattr(module, name).detach().abs() for module, name in weights(model)}


def fisher(model: nn.Module, task: Task) -> Scores:
    """Return the Fisher information of each weight times its square; labels are used here, and only here."""
    return times_squares(calibration.fisher(model, F.cross_entropy, task.loader, weights(model), progress=False))


def gauss_newton(model: nn.Module, task: Task) -> Scores:
    """Return the Gauss-Newton curvature along each weight times its square, from one random probe per image."""
    probe = torch.Generator().manual_seed(0)
    curvature = calibration.hessian_diagonal(
        model, F.cross_entropy, task.loader, weights(model), samples=1, generator=probe, progress=False
    )
    return times_squares(curvature)


def weights(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the five weights."""
    return [(model.get_submodule(path), "weight") for path in CHAPTER_AMOUNTS]


def times_squares(curvature: Scores) -> Scores:
    """Return ``h * w**2``."""
    return {(module, name): h * getattr(module, name).detach().square() for (module, name), h in curvature.items()}


CRITERIA = {"magnitude": magnitude, "Fisher x w^2": fisher, "GGN x w^2": gauss_newton}


# --- how to prune ---------------------------------------------------------------------------------


def once(task: Task, score: Callable[[nn.Module, Task], Scores], goal: Goal) -> tuple[Result, Result]:
    """Prune by one look at the network, and return what it came to as it is and after re-fitting."""
    model, params = task.network()
    scores = score(model, task)
    if isinstance(goal, Mapping):
        for path, amount in goal.items():
            key = (model.get_submodule(path), "weight")
            tpe.global_unstructured([key], target_sparsity=amount, importance_scores={key: scores[key]})
    else:
        tpe.global_unstructured(params, target_sparsity=goal, importance_scores=scores)
    plain = Result(accuracy(model, task.test))
    start = time.perf_counter()
    tpe.compensate(model, task.loader, params, **FITTED)
    return plain, Result(accuracy(model, task.test), seconds=time.perf_counter() - start)


def in_rounds(task: Task, score: Callable[[nn.Module, Task], Scores], goal: Goal) -> tuple[Result, LeNet]:
    """Prune and re-fit in rounds, as many as the held-out digits like best."""
    found = []
    for rounds in ROUNDS:
        model, params = task.network()
        target = goal
        if isinstance(goal, Mapping):
            target = {(model.get_submodule(path), "weight"): amount for path, amount in goal.items()}
        start = time.perf_counter()
        tpe.prune_in_rounds(
            model,
            task.loader,
            params,
            lambda pruned: score(pruned, task),
            target_sparsity=target,
            steps=rounds,
            **FITTED,
        )
        seconds = time.perf_counter() - start
        found.append((Result(accuracy(model, task.test), accuracy(model, task.held_out), seconds, rounds), model))
    return max(found, key=lambda pair: pair[0].held_out)


def refined(task: Task, model: LeNet) -> Result:
    """Refine what rounds have given, by the dense network's probabilities; nothing here sees a label."""
    start = time.perf_counter()
    digits = [part for images, _ in task.loader for part in images.split(BATCH // 10)]
    tpe.refine(
        model,
        digits,
        [model],
        dense=task.model,
        epochs=REFINING,
        loss=divergence,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3, betas=(0.9, 0.98)),
        progress=False,
    )
    return Result(accuracy(model, task.test), accuracy(model, task.held_out), time.perf_counter() - start)


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean divergence of the probabilities from those that are wanted."""
    return F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")


def shared(task: Task, sparsity: float) -> str:
    """Prune and re-fit by operator splitting, with shares chosen by the network's outputs; return what it came to."""
    model, params = task.network()
    start = time.perf_counter()
    tpe.prune_and_compensate(model, task.loader, params, target_sparsity=sparsity, allocation="auto", **FITTED)
    return f"{accuracy(model, task.test):.2f} ({time.perf_counter() - start:.0f} s)"


# --- the tables -----------------------------------------------------------------------------------


def table(task: Task, *, slow: bool) -> str:
    """Return the accuracies of all criteria, goals and ways, the ``slow`` ways only where these are asked for."""
    goals: list[Goal] = [CHAPTER_AMOUNTS, *SPARSITIES]
    heads = "".join(f"{head:>18}" for head in ("per layer", *(f"{sparsity:.2%}" for sparsity in SPARSITIES)))
    lines = [f"{'':<28}{heads}"]
    slowest = 0.0
    for name, score in progress(CRITERIA.items(), "criteria"):
        cells: dict[str, list[str]] = {"": [], ", compensated": [], ", in rounds": []}
        for goal in goals:
            plain, fitted = once(task, score, goal)
            best, model = in_rounds(task, score, goal)
            slowest = max(slowest, fitted.seconds)
            cells[""].append(f"{plain.test:.2f}")
            cells[", compensated"].append(f"{fitted.test:.2f}")
            cells[", in rounds"].append(f"{best.test:.2f} ({best.rounds}, {best.seconds:.0f} s)")
            if slow:
                last = refined(task, model)
                cells.setdefault(", refined", []).append(f"{last.test:.2f} ({last.seconds:.0f} s)")
        lines += [f"{name + way:<28}" + "".join(f"{cell:>18}" for cell in row) for way, row in cells.items()]
    if slow:
        cells_of = "".join(f"{shared(task, goal):>18}" for goal in SPARSITIES)
        lines.append(f"{'admm, shares by output':<28}{'':>18}{cells_of}")
    return "\n".join([*lines, f"\ncompensate() took at most {slowest:.1f} s"])


def two_of_four(task: Task) -> str:
    """Return the accuracies of ways to keep 2 of 4 input features or channels; a short last group is filled up."""
    pattern = tpe.NM(2, 4, pad=True)

    def plain(model: LeNet, params: list[tuple[nn.Module, str]]) -> None:
        for module, name in params:
            tpe.nm_structured(module, name, n=2, m=4, pad=True)

    def compensated(model: LeNet, params: list[tuple[nn.Module, str]]) -> None:
        plain(model, params)
        tpe.compensate(model, task.loader, params, **FITTED)

    def sparsegpt(model: LeNet, params: list[tuple[nn.Module, str]]) -> None:
        tpe.sparsegpt(model, task.loader, params, pattern=pattern, progress=False)

    def splitting(model: LeNet, params: list[tuple[nn.Module, str]]) -> None:
        tpe.prune_and_compensate(model, task.loader, params, pattern=pattern, **FITTED)

    lines = []
    for name, way in (
        ("magnitude", plain),
        ("magnitude, compensated", compensated),
        ("SparseGPT", sparsegpt),
        ("admm, compensated", splitting),
    ):
        model, params = task.network()
        way(model, params)
        lines.append(f"{name:<28}{accuracy(model, task.test):>18.2f}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="read MNIST from here, not scikit-learn's digits")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="state dict of a trained LeNet; do not train")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--all", action="store_true", help="the slow ways too: refined, and shares by output")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    """Load or train, and print the tables."""
    torch.set_num_threads(arguments.threads)
    digits = load_mnist(arguments.mnist) if arguments.mnist else load_sklearn_digits()
    if digits.train is None:
        raise FileNotFoundError(f"no training images in {arguments.mnist}: the survivors are re-fitted on them")
    model = dense_network(arguments.checkpoint, digits, epochs=20, seed=arguments.seed)
    known = digits.train.subset(len(digits.train), arguments.seed)
    count = min(CALIBRATION_IMAGES, len(known) * 3 // 4)
    loader = list(zip(known.images[:count].split(BATCH), known.labels[:count].split(BATCH), strict=True))
    held_out = LabelledImages(known.images[count:], known.labels[count:])
    task = Task(model, loader, held_out, digits.test)
    amounts = ", ".join(f"{path} {amount:.0%}" for path, amount in CHAPTER_AMOUNTS.items())
    print(
        f"dense LeNet: {accuracy(model, digits.test):.2f} % of the {len(digits.test):,} {digits.name} test images right"
        f"\n\nAccuracy without training, in percent of the test images; re-fitted on {count:,} training images.\n"
        f"Per layer: {amounts}. Otherwise that fraction of all entries of the five weights goes.\n"
        f"In brackets: rounds, the best of {ROUNDS} on {len(held_out):,} other training images, and seconds of all.\n"
    )
    print(table(task, slow=arguments.all))
    print(f"\n2 of 4 input features or channels of every layer:\n\n{two_of_four(task)}")


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
