"""A loss curve that grows while a model trains, in a notebook."""

from __future__ import annotations

import time

SECONDS_BETWEEN = 3.0


class LiveLoss:
    """Call it with (step, loss); the figure below the cell follows.

    The figure is a display that is updated in place, so an executed copy (papermill, nbmake) holds
    its last state, and nothing else of it. Outside a notebook nothing is shown.

    figure, axes: matplotlib's, for titles and saving. steps, losses: what was seen.
    """

    def __init__(self, title: str, window: int = 10):
        import matplotlib.pyplot as plt

        self.window, self.steps, self.losses = window, [], []
        self.figure, self.axes = plt.subplots()
        plt.close(self.figure)  # else the notebook shows it a second time when the cell ends
        self.title, self.shown, self.last = title, None, 0.0

    def __call__(self, step: int, loss: float) -> None:
        self.steps.append(step)
        self.losses.append(loss)
        if time.monotonic() - self.last > SECONDS_BETWEEN:
            self.draw()

    def draw(self) -> None:
        """Draw all points and their running mean; also shows the figure."""
        import numpy as np

        self.last = time.monotonic()
        self.axes.clear()
        self.axes.plot(self.steps, self.losses, linestyle="none", alpha=0.4, label="one step")
        n = min(self.window, len(self.losses))
        if n:
            mean = np.convolve(self.losses, np.ones(n) / n, mode="valid")
            self.axes.plot(self.steps[n - 1 :], mean, marker="", label=f"mean of {n}")
        self.axes.set(xlabel="optimiser step", ylabel="training loss (nats per token)")
        self.axes.set_ylim(0, None)
        self.axes.set_title(self.title)
        self.axes.legend()
        self._show()

    def _show(self) -> None:
        try:
            from IPython import get_ipython
            from IPython.display import display
        except ImportError:
            return
        if get_ipython() is None:
            return
        if self.shown is None:
            self.shown = display(self.figure, display_id=True)
        else:
            self.shown.update(self.figure)
