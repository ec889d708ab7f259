"""What all pictures share: colours, axes, and matplotlib itself."""

from typing import Any

KEPT = "#0072B2"  # blues and orange of Okabe and Ito's palette, told apart by everyone and in print
CUBE = "#56B4E9"  # the lit side of a kept cube
DENSE = "#E69F00"
PRUNED = "#E9E9E9"
LINE = "#4D4D4D"


def check_ax(param: str, ax: object, projection: str = "rectilinear") -> None:
    """Raise ``TypeError`` unless ``ax``, the caller's ``param``, is axes of matplotlib of that ``projection``."""
    from matplotlib.axes import Axes

    example = "figure.add_subplot(projection='3d')" if projection == "3d" else "figure.add_subplot()"
    if not isinstance(ax, Axes):
        raise TypeError(f"{param} is a {type(ax).__name__}. Pass matplotlib axes, e.g. {example}.")
    if ax.name != projection:
        raise TypeError(f"{param} has the projection {ax.name!r}, not {projection!r}. Pass e.g. {example}.")


def import_pyplot() -> Any:
    """Return ``matplotlib.pyplot``, or say which extra brings it."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("matplotlib is not installed: pip install torchprune-ext[plots]") from error
    return pyplot
