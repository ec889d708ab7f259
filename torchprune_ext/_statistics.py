"""Statistics of the tensors of a model, which know what they are."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

Key = tuple[nn.Module, str]


class Statistic(dict[Key, Tensor]):
    """A tensor for each ``(module, name)``, of one kind: a dictionary that tells for which arguments it is."""

    kind: ClassVar[str] = "a statistic"
    goes_to: ClassVar[dict[str, str]] = {}


class ImportanceScores(Statistic):
    """What each entry is worth, at least 0."""

    kind = "importance scores"
    goes_to: ClassVar = {"importance_scores": "global_unstructured and all other calls that rank by given scores"}


class Gradients(Statistic):
    """Gradients of a loss, which rank entries as scores do where only their size counts."""

    kind = "gradients"
    goes_to: ClassVar = {
        "grad": "global_gradient_magnitude",
        "importance_scores": "all calls that rank by given scores",
    }


class Curvature(Statistic):
    """Second derivatives of a loss, or what stands for them: a score only together with the weights."""

    kind = "a curvature"
    goes_to: ClassVar = {"hessian_diag": "global_obd_saliency, which multiplies it by weight ** 2 / 2"}


def check_kind(param: str, given: Mapping[Any, Any]) -> None:
    """Raise ``TypeError`` if ``given``, the caller's ``param``, is a statistic that is for another argument.

    A plain dictionary is taken for what the caller says.
    """
    if isinstance(given, Statistic) and param not in given.goes_to:
        argument, calls = next(iter(given.goes_to.items()))
        raise TypeError(
            f"{param} holds {given.kind}, namely {type(given).__name__} of torchprune_ext.calibration. Pass it as "
            f"{argument}= to {calls}; or pass {param}=dict(...) of it, if you mean that."
        )
