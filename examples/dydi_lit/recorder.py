"""What a training run tells about itself: the loss of every step, TensorBoard's curves, and the progress bar."""

import math
import time
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from examples.dydi_lit.diffusion import Losses


class Diverged(Exception):
    """A loss, gradient or weight is not a number any more, or infinite."""


class Recorder:
    """Collects the losses of the steps, and writes them out only now and then.

    Until `flush` they stay on the device, which need not wait for the host. To be used as a context, which closes the
    bar and the log. `losses` are those up to a resume; they grow by one number a step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        losses: list[float],
        *,
        folder: Path,
        steps: int,
        batch_size: int,
        progress: bool = True,
    ) -> None:
        self.accelerator, self.losses, self.batch_size = accelerator, losses, batch_size
        self._pending: list[Tensor] = []
        self._since = time.perf_counter()
        main = accelerator.is_main_process
        # Curves of a run that was killed may go beyond the checkpoint; TensorBoard drops them from `purge_step` on.
        self._log = SummaryWriter(str(folder), purge_step=len(losses) + 1) if main else None
        self._bar = tqdm(total=steps, initial=len(losses), unit="step", desc="train", disable=not (main and progress))

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.close()

    def add(self, losses: Losses, gradient_norm: Tensor) -> None:
        """Notes one step: this process's mean of each loss, and the norm before clipping, scalars each."""
        self._pending.append(torch.stack([*losses, gradient_norm]))

    def flush(self, learning_rate: float) -> None:
        """Writes what `add` noted since the last time; for all processes at once.

        Raises Diverged, naming the step, where a loss is not finite, or a gradient that has moved the weights: the
        loss scale of fp16 leaves such steps out.
        """
        if not self._pending:
            return
        done, count = len(self.losses), len(self._pending)
        rows = self.accelerator.reduce(torch.stack(self._pending), "mean").double().cpu()
        images_per_second = self.batch_size * count / (time.perf_counter() - self._since)
        for step, (loss, mse, variational, norm) in enumerate(rows.tolist(), done + 1):
            if not math.isfinite(loss):
                raise diverged(f"the loss of step {step} is {loss} (mse {mse}, variational {variational})")
            if not math.isfinite(norm) and self.accelerator.scaler is None:
                raise diverged(f"the norm of the gradient of step {step} is {norm}, with a loss of {loss}")
        self.losses += rows[:, 0].tolist()

        loss, mse, variational, gradient_norm = rows.mean(0).tolist()
        if self._log is not None:
            curves = {"loss": loss, "mse": mse, "variational": variational, "gradient_norm": gradient_norm}
            curves |= {"learning_rate": learning_rate, "images_per_second": images_per_second}
            for name, value in curves.items():
                self._log.add_scalar(name, value, done + count)
            self._log.flush()
        memory = memory_in_use(self.accelerator.device) / 2**30
        self._bar.set_postfix_str(f"loss {loss:.4f}, {images_per_second:.0f} images/s, {memory:.1f} GiB", refresh=False)
        self._bar.update(count)
        self._pending.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves the time since the last `flush` out of the throughput."""
        self._since = time.perf_counter()


def diverged(fault: str) -> Diverged:
    """The error that says what is not finite, and what to do now."""
    return Diverged(
        f"{fault}: the run has diverged, start again from a checkpoint or with a lower learning rate; nothing was "
        "saved since the last one"
    )


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that tensors took on a CUDA device so far, elsewhere this process's resident set."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
