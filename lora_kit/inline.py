"""Figures inside a notebook, small: a picture of 64 colours in place of millions.

An executed notebook carries its pictures as text. Line art needs few colours, and an indexed PNG of
it takes about a third of the bytes.
"""

from __future__ import annotations

import io


def show(figure, colours: int = 64) -> None:
    """Show a matplotlib figure in a notebook as an indexed PNG, and close it.

    Outside IPython this is `plt.show()`.
    """
    import matplotlib.pyplot as plt
    from IPython import get_ipython
    from IPython.display import Image, display
    from PIL import Image as Picture

    if get_ipython() is None:
        plt.show()
        return
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90, bbox_inches="tight")
    plt.close(figure)
    picture = Picture.open(drawn).convert("RGB")
    picture.quantize(colours, dither=Picture.Dither.NONE).save(packed, "PNG", optimize=True)
    display(Image(data=packed.getvalue(), format="png"))
