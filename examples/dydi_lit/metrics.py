"""The figures of merit of the paper's tables, from features that a network has found, all in float64.

FID and sFID, KID and sKID, and the inception score are torchmetrics'; precision and recall, which it does not have, are
written out here. Each takes features (n, d) of n images, computed once.
"""

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

_ROWS = 500  # images whose distances from all others are held at once


class _Given(nn.Module):
    """Stands for the network in torchmetrics, which is handed features instead of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid_of(generated: Tensor, real: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (n, d) float64, n at least 2."""
    metric = FrechetInceptionDistance(_Given(real.shape[1])).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric.compute().item()


def kid_of(generated: Tensor, real: Tensor, subsets: int, subset_size: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation over the subsets of the unbiased squared MMD, kernel (x y / d + 1)^3."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        metric = KernelInceptionDistance(_Given(real.shape[1]), subsets, subset_size).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws the subsets from torch's own generator
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def inception_score_of(logits: Tensor, parts: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation over the parts of exp(E KL(p(y|x), p(y))): logits (n, classes) float64.

    The images are dealt to the parts at random, by `seed`. With one part the deviation is 0.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `InceptionScore` will save all")
        metric = InceptionScore(_Given(logits.shape[1]), splits=parts).set_dtype(torch.float64)
    metric.update(logits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "std\\(\\): degrees of freedom is <= 0")
            mean, deviation = metric.compute()
    return mean.item(), deviation.item() if parts > 1 else 0.0


def precision_and_recall_of(generated: Tensor, real: Tensor, neighbours: int) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of two sets of more than `neighbours` features (n, d) each.

    A set covers a point that is no farther from one of its own points than this one's k-th nearest other point.
    Precision is the share of the generated points that the real ones cover, recall the reverse.
    """
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def _covered(points: Tensor, by: Tensor, neighbours: int) -> float:
    """The share of `points` that the set `by` covers."""
    # The nearest to a point is the point itself.
    radii = torch.cat([_distances(rows, by).kthvalue(neighbours + 1).values for rows in by.split(_ROWS)])
    return torch.cat([(_distances(rows, by) <= radii).any(1) for rows in points.split(_ROWS)]).double().mean().item()


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """(n, m); without the shortcut by products, which is not exact for near points."""
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
