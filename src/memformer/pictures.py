"""Pictures in files, by matplotlib, which is imported only here and only when one is drawn. Imports nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["check", "new_figure"]


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of that many inches; no window is opened. ``savefig(path)`` writes it.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import figure
        from matplotlib.backends import backend_agg
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'memformer-replay[plot]'", name="matplotlib") from error
    new = figure.Figure(figsize=(width, height), dpi=150, layout="constrained")
    backend_agg.FigureCanvasAgg(new)
    return new


def check(path: Path | None) -> None:
    """For the beginning of long work at whose end a picture is to be drawn: it can be, or there is to be none.

    Raises:
        ValueError: not the name of a PNG file in a folder that exists.
        ImportError: matplotlib is missing.
    """
    if path is None:
        return
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise ValueError(f"plot: expected the name of a .png file in a folder that exists, got {path}")
    new_figure(1, 1)
