"""The .npz of OpenAI's ADM evaluator: `arr_0` (n, height, width, 3) uint8 images, `arr_1` (n,) int64 labels."""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def save_npz(output: Path, batches: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Writes batches (., height, width, 3) uint8, one for each of `labels` in all, uncompressed and one at a time.

    The file appears when it is whole.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    with zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            for number, images in enumerate(batches):
                if number == 0:
                    header = np.lib.format.header_data_from_array_1_0(images)
                    header["shape"] = (len(labels), *images.shape[1:])
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(images.tobytes())
        with archive.open("arr_1.npy", "w") as stream:
            np.lib.format.write_array(stream, labels)
    os.replace(partial, output)
