"""All figures of merit of the paper: python -m examples.dydi_lit.evaluate SAMPLES --reference REFERENCE --features NAME

FID and sFID, KID and sKID, inception score (IS), precision and recall, each printed with what it depends on.

SAMPLES and REFERENCE are each an .npz as OpenAI's ADM evaluator reads it (`arr_0`, uint8, (n, height, width,
channels)), a folder of images (folders below it included), or one of the words `digits` and `digits-held-out`.

They depend on the network whose features are compared, so that it is yours to choose: `--features
package.module:name` names a function without arguments that returns a torch module, which takes uint8 images
(n, 3, h, w) to features (n, d), or to a dict of them:

    features    (n, d), for FID, KID, precision and recall
    spatial     (n, s), for sFID and sKID: features that know places, such as a few channels of an early layer
    logits      (n, classes), for IS

A figure whose features are missing is left out. With torch-fidelity installed, the usual Inception is, in a file
inception.py of the current folder and as `--features inception:Features`:

    from torch import nn
    from torchmetrics.image.fid import NoTrainInceptionV3

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
            self.network.Mixed_6d.branch1x1.register_forward_hook(self.keep)

        def keep(self, layer, images, out):  # sFID takes seven channels of this layer
            self.spatial = out[:, :7].flatten(1)

        def forward(self, images):
            features, logits = self.network._torch_fidelity_forward(images)
            return {"features": features, "logits": logits, "spatial": self.spatial}

The paper's figures come from OpenAI's evaluator, which has Inception weights and a resizing of its own; only that
program gives figures to set beside them (github.com/openai/guided-diffusion, folder evaluations):

    python evaluator.py REFERENCE.npz SAMPLES.npz
"""

import importlib
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torchmetrics
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from examples.dydi_lit.checkpoint import plain_errors
from examples.dydi_lit.data import DataError
from examples.dydi_lit.image_sets import DIGITS, ImageSet, as_grey, open_images
from examples.dydi_lit.metrics import fid_of, inception_score_of, kid_of, precision_and_recall_of
from examples.dydi_lit.parallel import processes

_PIXELS = "pixels"
_KINDS = {"features", "spatial", "logits"}
_NEEDS_FEATURES = (
    "--features is needed with this reference: pixels, or package.module:name of a function that returns a torch "
    "module taking uint8 images (n, 3, h, w) to features (n, d), such as an Inception (an example is at the beginning "
    "of examples/dydi_lit/evaluate.py). Figures comparable to the paper's need OpenAI's ADM evaluator instead: "
    "python evaluator.py REFERENCE.npz SAMPLES.npz, from github.com/openai/guided-diffusion, folder evaluations"
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare generated images with real ones: FID, sFID, KID, sKID, IS, precision and recall, in float64."""

    samples: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SAMPLES")]
    """Generated images: an .npz with arr_0 (n, height, width, channels) uint8, or a folder of images."""
    reference: str
    """Real images, likewise; or "digits", the ones that the demo trains on, or "digits-held-out"."""
    features: str | None = None
    """package.module:name of a function that returns the network whose features are compared, a torch module that takes
    uint8 images (n, 3, h, w) to (n, d), or to a dict of features, spatial and logits; or "pixels", the default where
    the reference is digits."""
    image_size: int | None = None
    """Pixels that the images of folders are scaled and cropped to; left alone without it."""
    subsets: int = 100
    """Subsets that KID and sKID are the mean over."""
    subset_size: int | None = None
    """Images in each of them, drawn without replacement; by default 1000, or all where there are fewer."""
    part_size: int = 5000
    """Images in each of the parts that IS is the mean over, or all where there are fewer."""
    neighbours: int = 3
    """Which nearest neighbour gives the radius around each image, for precision and recall."""
    seed: int = 0
    """Seed of the subsets and parts."""
    batch_size: int = 64
    """Images that features are computed of at once."""
    json: Path | None = None
    """JSON file to write the figures to, beside printing them."""


@dataclass(frozen=True)
class Evaluation:
    """The figures, None where the network has no features for them, and all that they depend on."""

    fid: float
    kid: float
    """Mean over the subsets, and their standard deviation (0 where every subset holds all images)."""
    kid_std: float
    sfid: float | None
    """FID of the spatial features; sKID likewise."""
    skid: float | None
    skid_std: float | None
    inception_score: float | None
    """Of the generated images: mean over the parts, and their standard deviation."""
    inception_score_std: float | None
    precision: float | None
    """Shares in 0..1; None where there are no more images than neighbours."""
    recall: float | None
    evaluator: str
    features: str
    num_features: int
    samples: str
    drawn: dict[str, Any] | None
    """What `generate` wrote of the samples beside them: by which model, and how."""
    num_samples: int
    reference: str
    num_reference: int
    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    subsets: int
    subset_size: int
    parts: int
    neighbours: int
    seed: int
    notes: list[str]
    """What the figures should not be trusted for."""


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Computes the figures, with no work done before all arguments are seen to fit. Raises DataError."""
    for name in ("image_size", "subsets", "part_size", "neighbours", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1; got {value}")
    if config.features is None and config.reference not in DIGITS:
        raise DataError(_NEEDS_FEATURES)
    name = _PIXELS if config.features is None else config.features
    samples, reference = (open_images(source, config.image_size) for source in (config.samples, config.reference))
    if samples.shape[0] != reference.shape[0]:
        samples, reference = as_grey(samples), as_grey(reference)
    if samples.shape != reference.shape:
        raise DataError(
            f"images differ in height and width: {samples.shape[1:]} in {samples.name}, {reference.shape[1:]} in "
            f"{reference.name}; --image-size crops the images of folders"
        )
    fewest = min(samples.count, reference.count)
    if fewest < 2:
        raise DataError(f"at least 2 images are needed on each side; got {samples.count} and {reference.count}")
    subset_size = min(1000, fewest) if config.subset_size is None else config.subset_size
    if not 2 <= subset_size <= fewest:
        raise DataError(f"subset_size must be between 2 and the smaller number of images, {fewest}; got {subset_size}")

    network = load_features(name).to(processes().device)
    generated, real = (features_of(images, network, config.batch_size) for images in (samples, reference))
    drawing = config.subsets, subset_size, config.seed
    kid, kid_std = kid_of(generated["features"], real["features"], *drawing)
    sfid = skid = skid_std = score = score_std = precision = recall = None
    if "spatial" in generated:
        sfid = fid_of(generated["spatial"], real["spatial"])
        skid, skid_std = kid_of(generated["spatial"], real["spatial"], *drawing)
    parts = max(samples.count // config.part_size, 1)
    if "logits" in generated:
        score, score_std = inception_score_of(generated["logits"], parts, config.seed)
    if fewest > config.neighbours:
        precision, recall = precision_and_recall_of(generated["features"], real["features"], config.neighbours)
    notes = []
    if fewest <= (num_features := real["features"].shape[1]):
        notes.append(
            f"{fewest} images cannot give a covariance of {num_features} features full rank: FID depends on the number "
            "of images; compare it with figures of the same numbers only"
        )
    if subset_size == fewest:
        notes.append(f"each of KID's subsets holds all {fewest} images of a side: its standard deviation says little")
    return Evaluation(
        fid=fid_of(generated["features"], real["features"]),
        kid=kid,
        kid_std=kid_std,
        sfid=sfid,
        skid=skid,
        skid_std=skid_std,
        inception_score=score,
        inception_score_std=score_std,
        precision=precision,
        recall=recall,
        evaluator=f"torchmetrics {torchmetrics.__version__}",
        features=name,
        num_features=num_features,
        samples=samples.name,
        drawn=drawn_of(config.samples),
        num_samples=samples.count,
        reference=reference.name,
        num_reference=reference.count,
        image_shape=samples.shape,
        subsets=config.subsets,
        subset_size=subset_size,
        parts=parts,
        neighbours=config.neighbours,
        seed=config.seed,
        notes=notes,
    )


def drawn_of(samples: str) -> dict[str, Any] | None:
    """What SAMPLES.json tells, where there is one; DataError where it is no JSON object."""
    file = Path(samples + ".json")
    if not file.is_file():
        return None
    try:
        drawn = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from None
    if not isinstance(drawn, dict):
        raise DataError(f"{file} must hold an object, as generate writes it")
    return drawn


# --- features


class Pixels(nn.Module):
    """The pixels themselves as features: (n, c, h, w) uint8 -> (n, c h w) float32 in 0..1."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 255


def load_features(name: str) -> nn.Module:
    """The module that the function `package.module:name` returns, to be evaluated; DataError where it returns none."""
    if name == _PIXELS:
        return Pixels()
    module_name, colon, function = name.partition(":")
    if not (module_name and colon and function):
        raise DataError(f"features must be package.module:name or {_PIXELS}; got {name!r}")
    try:  # python -m finds modules in the current folder too
        make = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise DataError(f"cannot import the features {name!r}: {error}") from error
    network = make() if callable(make) else make
    if not isinstance(network, nn.Module):
        raise DataError(f"the function {name!r} must return a torch module; it returned {type(network).__name__}")
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def features_of(images: ImageSet, network: nn.Module, batch_size: int) -> dict[str, Tensor]:
    """What the network finds in all images, each (n, d) float64 on the CPU: "features", "spatial" and "logits" if any.

    A network is given grey images as three equal channels.
    """
    device, parts = processes().device, defaultdict(list)
    starts = range(0, images.count, batch_size)
    for start in tqdm(starts, unit="batch", desc=f"features of {images.name}"):
        batch = images.read(start, min(start + batch_size, images.count)).to(device)
        if images.shape[0] == 1 and not isinstance(network, Pixels):
            batch = batch.expand(-1, 3, -1, -1)
        found = network(batch)
        found = found if isinstance(found, dict) else {"features": found}
        if "features" not in found or found.keys() - _KINDS:
            raise DataError(f"a network must return features and may return spatial and logits; got {', '.join(found)}")
        for name, features in found.items():
            if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(batch):
                shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise DataError(
                    f"{name} must be a tensor (n, d), one row to an image; {len(batch)} images gave {shape}"
                )
            parts[name].append(features.cpu().double())
    whole = {name: torch.cat(rows) for name, rows in parts.items()}
    for name, features in whole.items():
        if not features.isfinite().all():
            raise DataError(f"the {name} of {images.name} are not all finite")
    return whole


# --- figures


def print_evaluation(result: Evaluation) -> None:
    """Prints each figure with the evaluator and the features it comes from."""
    by = f"{result.evaluator}, features {result.features} ({result.num_features}), float64"
    over = f"{result.subsets} subsets of {result.subset_size}, seed {result.seed}"
    print(f"FID {result.fid:.4f}  ({by})")
    print(f"KID {result.kid:.6f} ± {result.kid_std:.6f}  ({by}; mean and standard deviation of {over})")
    if result.sfid is not None:
        spatial = f"{result.evaluator}, spatial features of {result.features}, float64"
        print(f"sFID {result.sfid:.4f}  ({spatial})")
        print(f"sKID {result.skid:.6f} ± {result.skid_std:.6f}  ({spatial}; mean and standard deviation of {over})")
    if result.inception_score is not None:
        score = f"{result.inception_score:.4f} ± {result.inception_score_std:.4f}"
        dealt = f"mean and standard deviation of {result.parts} parts, seed {result.seed}"
        print(f"IS {score}  ({result.evaluator}, logits of {result.features}, float64; {dealt})")
    if result.precision is not None:
        own = by.replace(result.evaluator, "examples.dydi_lit.metrics")
        for name, share in (("precision", result.precision), ("recall", result.recall)):
            print(f"{name} {share:.4f}  ({own}; radius to neighbour {result.neighbours})")
    missing = {"sFID": result.sfid, "sKID": result.skid, "IS": result.inception_score, "precision": result.precision}
    if left_out := [name for name, value in missing.items() if value is None]:
        print(f"left out: {', '.join(left_out)} (no spatial features or logits, or too few images)")
    channels, height, width = result.image_shape
    print(
        f"of {result.num_samples} images in {result.samples} against {result.num_reference} in {result.reference}, "
        f"{height}x{width} pixels, {channels} {'channel' if channels == 1 else 'channels'}"
    )
    for note in result.notes:
        print(f"note: {note}")


def main() -> None:
    with plain_errors():
        config = tyro.cli(EvaluateConfig, prog="python -m examples.dydi_lit.evaluate")
        result = evaluate(config)
    print_evaluation(result)
    if config.json:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
