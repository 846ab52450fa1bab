"""Saves a picture for light pages and one for dark pages, with a description of what they show.

The tests compare the description with a new drawing to see whether a saved picture is still
current. Measured times differ in every run: set the gid of artists that show them to MEASURED, and
only their names are compared.
"""

import json
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEASURED = "measured"
# Narrow, with a large font, to be readable on a phone.
WIDTH = 5.2

Colors = dict[str, str]

# Colors on the two backgrounds that color-blind readers can tell apart.
_COLORS = {
    "light": {
        "page": "#FFFFFF",
        "text": "#1F2328",
        "exact": "#C8CCD1",
        "jax_bce": "#0072B2",
        "optax": "#00835F",
        "PyTorch": "#C75300",
        "Keras 3 on JAX": "#B4568C",
        "plain jnp": "#9A6B00",
        "naive": "#9A6B00",
        "clipped": "#6B7280",
    },
    "dark": {
        "page": "#0D1117",
        "text": "#E6EDF3",
        "exact": "#4A525C",
        "jax_bce": "#56B4E9",
        "optax": "#2CC197",
        "PyTorch": "#FF8A4C",
        "Keras 3 on JAX": "#E29CC6",
        "plain jnp": "#E8B339",
        "naive": "#E8B339",
        "clipped": "#A0A8B2",
    },
}


def _style(colors: Colors) -> dict[str, object]:
    text = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(text, colors["text"]),
        "figure.facecolor": colors["page"],
        "axes.facecolor": colors["page"],
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "grid.alpha": 0.12,
        "grid.color": colors["text"],
        "legend.fontsize": 10,
        "legend.frameon": False,
        "savefig.dpi": 200,
    }


def describe(figure: Figure) -> dict:
    """The texts, the named curves and the measured bars of each panel."""
    panels = []
    for axis in figure.axes:
        legend = axis.get_legend()
        notes = [*(legend.get_texts() if legend else []), *axis.texts]
        words = [axis.get_title("left"), axis.get_xlabel(), axis.get_ylabel()]
        words += [note.get_text() for note in notes if not _is_measured(note)]
        curves = {
            line.get_label(): [float(f"{value:.4g}") for value in np.asarray(line.get_ydata())]
            for line in axis.lines
            if not line.get_label().startswith("_")  # matplotlib's label for a curve without a name
        }
        bars = {bar.get_label(): bar.get_width() for bar in axis.patches if _is_measured(bar)}
        panels.append({"words": words, "curves": curves, MEASURED: bars})
    return {"panels": panels}


def _is_measured(artist: Artist) -> bool:
    return artist.get_gid() == MEASURED


def add_options(parser: ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--plot", type=Path, default=Path(name), help=f"file for the picture (default: {name})"
    )
    parser.add_argument("--dark", type=Path, help="file for the same picture for dark pages")


def save(draw: Callable[[Colors], Figure], light: Path, dark: Path | None) -> None:
    """Draws and saves the picture in the colors of each requested page."""
    for path, colors in ((light, _COLORS["light"]), (dark, _COLORS["dark"])):
        if path is None:
            continue
        with plt.rc_context(_style(colors)):
            figure = draw(colors)
            figure.savefig(path, metadata={"Description": json.dumps(describe(figure))})
            plt.close(figure)
