"""Real images for OpenAI's ADM evaluator: python -m examples.dydi_lit.reference_batch IMAGES OUTPUT.npz

The evaluator compares generated images with a reference batch. ImageNet's is published with it; that of Sub-IN, or of
data of your own, is made here of the images that were trained on, cropped and scaled as they were.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from torch.utils.data import DataLoader
from tqdm import tqdm

from examples.dydi_lit.checkpoint import plain_errors
from examples.dydi_lit.data import DataError, FolderData
from examples.dydi_lit.npz import save_npz


@dataclass(frozen=True)
class ReferenceConfig:
    """Write a folder of images as the .npz that OpenAI's ADM evaluator takes for its reference."""

    images: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGES")]
    """Folder with one sub-folder of images per class. All are decoded first: one that cannot be read is an error."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")]
    """File to write, OUTPUT.npz; 196 kB for each image of 256 pixels."""
    image_size: int = 256
    """Pixels that images are scaled and cropped to."""
    classes: Path | None = None
    """Text file with the names of the class folders to take, one to a line; all of them without it."""
    workers: int = 4
    """Processes that decode images; 0 decodes in the process itself."""


def write_reference(config: ReferenceConfig) -> int:
    """Writes the file and returns the number of images; DataError before that for images that cannot be read."""
    if config.output.suffix != ".npz":
        raise DataError(f"the output must be a file called *.npz; got {config.output}")
    data = FolderData(config.images, config.image_size, "refuse", config.classes)
    loader = DataLoader(data, batch_size=64, num_workers=config.workers)
    batches = (images.permute(0, 2, 3, 1).contiguous().numpy() for images, _ in tqdm(loader, "write", unit="batch"))
    save_npz(config.output, batches, data.labels.astype(np.int64))
    return len(data)


def main() -> None:
    config = tyro.cli(ReferenceConfig, prog="python -m examples.dydi_lit.reference_batch")
    with plain_errors():
        count = write_reference(config)
    print(f"wrote {count} images to {config.output}")


if __name__ == "__main__":
    main()
