"""Where a run's losses can be sent, beside the lines it prints: TensorBoard or trackio, if asked.

Both write to local files; nothing is sent anywhere, no account is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_kit.errors import NotAvailableError, unknown_name

TRACKERS = ("none", "tensorboard", "trackio")


@contextmanager
def tracker(kind: str, name: str, folder: Path) -> Iterator[Callable[[int, float], None] | None]:
    """Within the context, a function (step, loss) that logs; None for kind "none".

    Args:
        kind: one of `TRACKERS`.
        name: of the run.
        folder: for TensorBoard's files.

    Raises:
        UnknownNameError: no such tracker.
        NotAvailableError: its package is not installed.
    """
    if kind not in TRACKERS:
        raise unknown_name("tracker", kind, TRACKERS)
    if kind == "none":
        yield None
    elif kind == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        with SummaryWriter(str(folder)) as writer:
            yield lambda step, loss: writer.add_scalar("train/loss", loss, step)
    else:
        try:
            import trackio
        except ImportError as error:
            raise _missing("trackio") from error
        trackio.init(project="lora-kit", name=name, embed=False)
        try:
            yield lambda step, loss: trackio.log({"train/loss": loss}, step=step)
        finally:
            trackio.finish()


def _missing(package: str) -> NotAvailableError:
    return NotAvailableError(
        f"Logging to {package} needs its package: pip install {package}, or leave --log out."
    )
