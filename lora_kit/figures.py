"""Figures: one style, one `save`.

Colours are Okabe and Ito's palette (2008), told apart by colour-blind readers; each line style also
has its own marker and dash, and the order of the palette alternates in lightness, so that a grey
print stays readable.
"""

from __future__ import annotations

import os
from pathlib import Path

from lora_kit.errors import BadInputError

# Okabe-Ito, dark and light in turn: neighbours differ in grey as well as in hue.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#000000", "#CC79A7", "#D55E00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def use_style() -> None:
    """Set the kit's look in matplotlib for every figure drawn after this call."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 4.0),
            "figure.dpi": 100,
            "savefig.dpi": 110,
            "savefig.bbox": "tight",
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "axes.prop_cycle": cycler(color=COLOURS)
            + cycler(marker=MARKERS)
            + cycler(linestyle=DASHES),
            "image.cmap": "cividis",
        }
    )


def figures_folder() -> Path:
    """Where `save` writes: LORA_KIT_FIGURES if set, else `figures/` of the checkout.

    A run started by `lora-kit run` sets LORA_KIT_FIGURES to its own output folder, so that a trial
    with tiny parameters never overwrites the committed figures.
    """
    given = os.environ.get("LORA_KIT_FIGURES")
    if given:
        return Path(given).expanduser()
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").exists() and (folder / "lora_kit").is_dir():
            return folder / "figures"
    return here / "figures"


def save(figure, name: str) -> Path:
    """Write `figure` as `<name>.png` into the figures folder and return its path.

    The file appears whole or not at all. `name` is letters, digits, '_' and '-' only, and starts
    with the notebook's number (`03_loss`).

    Raises:
        BadInputError: the name has another character.
    """
    if not name or not all(c.isalnum() or c in "_-" for c in name):
        raise BadInputError(f"A figure's name has letters, digits, '_' and '-' only, not {name!r}.")
    folder = figures_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    part = folder / f".{name}.part.png"
    # No software version or date in the file: the same figure gives the same bytes.
    try:
        figure.savefig(part, metadata={"Software": None})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
