"""Figures of matplotlib, drawn into memory."""

import os

from torch_utils.errors import MissingExtra


def new_figure(purpose: str, **options):
    """An empty matplotlib Figure for the Agg backend. Global state of matplotlib is not changed.

    purpose: what needs the figure, for the error.
    options: keyword arguments of ``matplotlib.figure.Figure``.

    Raises MissingExtra without matplotlib.
    """
    # Notebooks set MPLBACKEND to a backend of their own, which matplotlib checks on import.
    preset = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "plot", purpose) from None
    finally:
        if preset is not None:
            os.environ["MPLBACKEND"] = preset
    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure
