"""One budget over a whole model: native ``global_unstructured`` against ours, kernels against ``cat`` + ``kthvalue``.

Seconds are medians of alternating runs in one process, each on a fresh copy of the layers; memory is the rise of the
peak in a fresh process, masks and pruned weights included. Most of what many layers cost is the system's work for
memory that is touched first; ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` (huge pages) takes it out of the picture.
Run: ``python examples/benchmark_global.py [--layers 4 16] [--width 4096] [--threads 2] [--rounds 5]``.
"""

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
from measure import difference, extra_megabytes, in_fresh_process
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

AMOUNT = 0.8
Params = list[tuple[nn.Module, str]]


def linears(layers: int, width: int) -> Params:
    """Return freshly initialized layers; random weights have no ties to speak of."""
    torch.manual_seed(0)
    return [(nn.Linear(width, width, bias=False), "weight") for _ in range(layers)]


def resnet_convs() -> Params:
    """Return the convolutions of torchvision's ``resnet50``, randomly initialized."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    return tpe.prunable_parameters(resnet50(), types=nn.Conv2d)


def ours(params: Params) -> None:
    """Prune entries with ``torchprune_ext``."""
    tpe.global_unstructured(params, amount=AMOUNT)


def native(params: Params) -> None:
    """Prune entries with ``torch.nn.utils.prune``."""
    prune.global_unstructured(params, prune.L1Unstructured, amount=AMOUNT)


def our_kernels(params: Params) -> None:
    """Prune kernels with ``torchprune_ext``."""
    tpe.global_kernel_ln(params, amount=AMOUNT, n=2, min_keep=0)


def obvious_kernels(params: Params) -> None:
    """Prune kernels the obvious way: concatenate all scores, take the threshold, install custom masks."""
    norms = [module.weight.detach().square().mean((2, 3)).sqrt() for module, _ in params]
    scores = torch.cat([norm.flatten() for norm in norms])
    threshold = scores.kthvalue(round(AMOUNT * len(scores))).values
    for (module, name), norm in zip(params, norms, strict=True):
        prune.custom_from_mask(module, name, (norm > threshold)[:, :, None, None].expand_as(module.weight).float())


CALLS: dict[str, Callable[[Params], None]] = {
    "ours": ours,
    "native": native,
    "our_kernels": our_kernels,
    "obvious_kernels": obvious_kernels,
}


def taken(calls: list[str], make: Callable[[], Params], rounds: int) -> tuple[dict[str, list[float]], str]:
    """Return the seconds of each run of each call, and in what the masks of the first and the last call differ.

    As ``"copies"`` stands what plain copies in place of masks and products take: the physical limit.
    """
    times: dict[str, list[float]] = {call: [] for call in [*calls, "copies"]}
    params = make()
    CALLS[calls[0]](params)  # the first touch of memory is the machine's affair
    tpe.undo_all(nn.ModuleList(module for module, _ in params))
    for _ in range(rounds):
        masks = []
        for call in calls:
            start = time.perf_counter()
            CALLS[call](params)
            times[call].append(time.perf_counter() - start)
            masks.append([getattr(module, f"{name}_mask") for module, name in params])
            for module, name in params:
                tpe.undo(module, name)
        weights = [getattr(module, name).detach() for module, name in params]
        same = difference(weights, masks[0], masks[-1])
        del masks
    for _ in range(rounds):
        start = time.perf_counter()
        made = [(weight.clone(), weight.clone()) for weight in weights]
        times["copies"].append(time.perf_counter() - start)
        del made
    return times, same


def memory(call: str, layers: int, width: int) -> None:
    """Print the extra peak memory of one call, in MB; run in a process of its own."""
    CALLS[call](linears(1, 8) if "kernels" not in call else [(nn.Conv2d(2, 2, 3), "weight")])  # load what loads late
    params = resnet_convs() if "kernels" in call else linears(layers, width)
    print(extra_megabytes(lambda: CALLS[call](params)))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--native-layers", type=int, default=4, help="most layers that native is tried on")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", nargs=2, metavar=("CALL", "LAYERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        memory(options.memory[0], int(options.memory[1]), options.width)
        return

    def extra(call: str, layers: int) -> float:
        sizes = ("--threads", str(options.threads), "--width", str(options.width))
        return float(in_fresh_process(__file__, *sizes, "--memory", call, str(layers)))

    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {options.threads} threads, float32, amount "
        f"{AMOUNT}, medians of {options.rounds} alternating runs"
    )
    memory_columns = f"{'ours':>12}{'native':>12}{'ratio':>7}"
    print(f"\n{'entries of':<20}{'ours':>10}{'copies':>10}{'native':>10}{'ratio':>8}{memory_columns}")
    fastest = []
    for layers in options.layers:
        calls = ["ours", "native"] if layers <= options.native_layers else ["ours"]
        runs, same = taken(calls, lambda layers=layers: linears(layers, options.width), options.rounds)
        times = {call: median(each) for call, each in runs.items()}
        fastest.append({call: min(each) for call, each in runs.items()})
        megabytes = {call: extra(call, layers) for call in calls}
        row = f"{f'{layers} x Linear {options.width}':<20}{times['ours']:>8.2f} s{times['copies']:>8.2f} s"
        if "native" in calls:
            row += f"{times['native']:>8.2f} s{times['native'] / times['ours']:>7.1f}x{megabytes['ours']:>9.0f} MB"
            row += f"{megabytes['native']:>9.0f} MB{megabytes['ours'] / megabytes['native']:>7.2f}  masks {same}"
        else:
            row += f"{'-':>10}{'-':>8}{megabytes['ours']:>9.0f} MB"
        print(row)
    if len(fastest) > 1:
        growth = {call: fastest[-1][call] / fastest[0][call] for call in ("ours", "copies")}
        print(
            f"{options.layers[-1] / options.layers[0]:g} times the weights take {growth['ours']:.2f} times as long, "
            f"plain copies of masks and products {growth['copies']:.2f} times (fastest runs)"
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the obvious way has no floor, so ours gets none and says so
        runs, same = taken(["our_kernels", "obvious_kernels"], resnet_convs, options.rounds)
    times = {call: median(each) for call, each in runs.items()}
    megabytes = {call: extra(call, 0) for call in CALLS if "kernels" in call}
    print(f"\n{'kernels of':<28}{'ours':>10}{'obvious':>10}{'ratio':>9}{'ours':>12}{'obvious':>12}{'ratio':>7}  masks")
    print(
        f"{'resnet50':<28}{times['our_kernels']:>8.2f} s{times['obvious_kernels']:>8.2f} s"
        f"{times['obvious_kernels'] / times['our_kernels']:>8.1f}x{megabytes['our_kernels']:>9.0f} MB"
        f"{megabytes['obvious_kernels']:>9.0f} MB{megabytes['our_kernels'] / megabytes['obvious_kernels']:>7.2f}"
        f"  {same}"
    )


if __name__ == "__main__":
    main()
