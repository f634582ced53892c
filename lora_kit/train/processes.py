"""One model trained by several processes, each with a share of every step's rows.

`accelerate launch` or torchrun starts them and says so in their environment. A step's loss is

    L = −1/T · Σ log p,   T the labels of the whole step, whoever has them,

so the gradient is the plain sum of the processes' gradients: with the rows of a step divided among
n processes the adapter is the one a single process trains, whatever T each of them got. (Averaging
the processes' own means would weigh a label by how few its process has.)
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Processes:
    """How many there are, and which this is (`index`, from 0). The first is `main`: it alone prints
    and writes."""

    def __init__(self, count: int = 1, index: int = 0):
        self.count, self.index = count, index

    @property
    def main(self) -> bool:
        return self.index == 0

    def share(self, rows: Sequence) -> Sequence:
        """This process's part of a step's rows; none, where there are fewer rows than processes."""
        return rows[self.index :: self.count]

    def sum_up(
        self, loss: torch.Tensor | float, parameters: Sequence[torch.nn.Parameter]
    ) -> torch.Tensor | float:
        """The loss of all processes, whose gradients are added up in `parameters`: one message."""
        if self.count == 1:
            return loss
        import torch
        from accelerate.utils import reduce

        like = parameters[0]
        loss = torch.as_tensor(loss, device=like.device, dtype=torch.float32).reshape(1)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        whole = reduce(torch.cat([loss, *(p.float().flatten() for p in parts)]), "sum")
        rest = whole[1:].split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, rest, strict=True):
            part = part.view_as(parameter).to(parameter.dtype)
            if parameter.grad is None:
                parameter.grad = part.clone()
            else:
                parameter.grad.copy_(part)  # in place: a recorded graph writes to where it lies
        return whole[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """What other processes than the first print inside the block goes nowhere."""
        if self.main:
            yield
            return
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield


@functools.cache
def processes() -> Processes:
    """The processes this one was started with; one, where nobody started several. They find each
    other at the first call, and each takes its own GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    import torch
    from accelerate import PartialState

    # cpu=True: without a GPU accelerate takes torchrun's processes for unrelated ones.
    state = PartialState(cpu=not torch.cuda.is_available())
    return Processes(state.num_processes, state.process_index)
