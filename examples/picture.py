"""Saves a picture with a description of what it shows, which tells when it is no longer current."""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def describe(figure: Figure) -> dict:
    """What is written in each panel, and the curves in it by name."""
    panels = []
    for axis in figure.axes:
        legend = axis.get_legend()
        notes = [*(legend.get_texts() if legend else []), *axis.texts]
        words = [axis.get_title(), axis.get_xlabel(), axis.get_ylabel()]
        words += [note.get_text() for note in notes]
        lines = {line.get_label(): line.get_ydata() for line in axis.lines}
        curves = {
            name: [float(f"{value:.4g}") for value in np.asarray(values)]
            for name, values in lines.items()
            if not name.startswith("_")  # matplotlib's own, of a curve without a name
        }
        panels.append({"words": words, "curves": curves})
    return {"panels": panels}


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, metadata={"Description": json.dumps(describe(figure))})
