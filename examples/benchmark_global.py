"""One budget over a whole model: native ``global_unstructured`` against ours, kernels against ``cat`` + ``kthvalue``.

Seconds are medians of alternating runs in one process, each on a fresh copy of the layers; memory is the rise of the
peak in a fresh process, masks and pruned weights included.
Run: ``python examples/benchmark_global.py [--layers 4 16] [--width 4096] [--threads 2] [--rounds 3]``.
"""

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
from measure import extra_megabytes, in_fresh_process
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


def taken(calls: list[str], make: Callable[[], Params], rounds: int) -> tuple[dict[str, float], str]:
    """Return the median seconds of each call on fresh layers, and in what their masks differ."""
    times: dict[str, list[float]] = {call: [] for call in calls}
    params = make()
    for _ in range(rounds):
        masks = []
        for call in calls:
            start = time.perf_counter()
            CALLS[call](params)
            times[call].append(time.perf_counter() - start)
            masks.append([getattr(module, f"{name}_mask") for module, name in params])
            for module, name in params:
                tpe.undo(module, name)
    return {call: median(each) for call, each in times.items()}, difference(params, masks[0], masks[-1])


def difference(params: Params, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str:
    """Say whether two sets of masks agree, and if not, whether only ties at the threshold were cut differently."""
    scores = [getattr(module, name)[a != b] for (module, name), a, b in zip(params, ours, theirs, strict=True)]
    apart = torch.cat(scores).detach().abs()
    if not len(apart):
        return "identical"
    ties = sum(int((getattr(module, name).abs() == apart[0]).sum()) for module, name in params)
    kept = sum(map(torch.sum, ours)) == sum(map(torch.sum, theirs))
    if kept and bool((apart == apart[0]).all()):
        return f"identical but for {len(apart)} of {ties} ties at the threshold"
    return f"DIFFERENT in {len(apart)} entries"


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
    parser.add_argument("--rounds", type=int, default=3)
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
    print(f"\n{'entries of':<28}{'ours':>10}{'native':>10}{'ratio':>9}{'ours':>12}{'native':>12}{'ratio':>7}  masks")
    ours_seconds = []
    for layers in options.layers:
        calls = ["ours", "native"] if layers <= options.native_layers else ["ours"]
        times, same = taken(calls, lambda layers=layers: linears(layers, options.width), options.rounds)
        megabytes = {call: extra(call, layers) for call in calls}
        ours_seconds.append(times["ours"])
        row = f"{f'{layers} x Linear {options.width}':<28}{times['ours']:>8.2f} s"
        if "native" in calls:
            row += f"{times['native']:>8.2f} s{times['native'] / times['ours']:>8.1f}x{megabytes['ours']:>9.0f} MB"
            row += f"{megabytes['native']:>9.0f} MB{megabytes['ours'] / megabytes['native']:>7.2f}"
            row += f"  {same}"
        else:
            row += f"{'-':>10}{'-':>9}{megabytes['ours']:>9.0f} MB"
        print(row)
    if len(ours_seconds) > 1:
        growth = ours_seconds[-1] / ours_seconds[0]
        print(f"{options.layers[-1] / options.layers[0]:g} times the weights take {growth:.2f} times as long")

    times, same = taken(["our_kernels", "obvious_kernels"], resnet_convs, options.rounds)
    megabytes = {call: extra(call, 0) for call in times}
    print(f"\n{'kernels of':<28}{'ours':>10}{'obvious':>10}{'ratio':>9}{'ours':>12}{'obvious':>12}{'ratio':>7}  masks")
    print(
        f"{'resnet50':<28}{times['our_kernels']:>8.2f} s{times['obvious_kernels']:>8.2f} s"
        f"{times['obvious_kernels'] / times['our_kernels']:>8.1f}x{megabytes['our_kernels']:>9.0f} MB"
        f"{megabytes['obvious_kernels']:>9.0f} MB{megabytes['our_kernels'] / megabytes['obvious_kernels']:>7.2f}"
        f"  {same}"
    )


if __name__ == "__main__":
    main()
