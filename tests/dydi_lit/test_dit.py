"""DiT's weights, under DiT's names, give DiT's output in the kit's network."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("examples.dydi_lit")

from torch import Tensor

from examples.dydi_lit.configs import config_of
from examples.dydi_lit.model import DiffusionTransformer, position_embedding

WIDTH, HEADS, BLOCKS, CLASSES, CHANNELS, PATCH = 64, 2, 2, 5, 3, 2


def dits_positions(dim: int, rows: int, columns: int) -> np.ndarray:
    """(rows * columns, dim) float64: sines and cosines of the column, then of the row, with dim/4 frequencies each."""

    def waves(places: np.ndarray) -> np.ndarray:
        frequencies = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
        angles = places.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], 1)

    column, row = np.meshgrid(np.arange(columns, dtype=float), np.arange(rows, dtype=float))
    return np.concatenate([waves(column), waves(row)], 1)


def dits_weights() -> dict[str, Tensor]:
    """Random weights with the names and shapes of DiT's."""
    outputs = 2 * CHANNELS * PATCH**2
    shapes = {
        "x_embedder.proj": (WIDTH, CHANNELS, PATCH, PATCH),
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "final_layer.linear": (outputs, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    for block in range(BLOCKS):
        parts = {"attn.qkv": 3, "attn.proj": 1, "adaLN_modulation.1": 6, "mlp.fc1": 4}
        shapes |= {f"blocks.{block}.{name}": (times * WIDTH, WIDTH) for name, times in parts.items()}
        shapes[f"blocks.{block}.mlp.fc2"] = (WIDTH, 4 * WIDTH)
    weights = {f"{name}.weight": torch.randn(shape, dtype=torch.float64) * 0.1 for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.randn(shape[0], dtype=torch.float64) * 0.1 for name, shape in shapes.items()}
    return weights | {"y_embedder.embedding_table.weight": torch.randn(CLASSES + 1, WIDTH, dtype=torch.float64)}


def dit(weights: dict[str, Tensor], image: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
    """DiT written out: a convolution, adaLN-Zero blocks, and patches ordered by row, column and channel at the end."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    patches = F.conv2d(image, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=PATCH)
    rows, columns = patches.shape[2:]
    x = patches.flatten(2).mT + torch.from_numpy(dits_positions(WIDTH, rows, columns))

    angles = timestep[:, None] * torch.exp(-np.log(10000.0) * torch.arange(128, dtype=torch.float64) / 128)
    time = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
    condition = F.silu(linear("t_embedder.mlp.2", F.silu(time)) + weights["y_embedder.embedding_table.weight"][label])

    for number in range(BLOCKS):
        name = f"blocks.{number}"
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = linear(f"{name}.adaLN_modulation.1", condition).chunk(6, 1)
        mixed = linear(f"{name}.attn.qkv", modulated(x, shift, scale)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = mixed.permute(2, 0, 3, 1, 4)
        attended = torch.softmax(q @ k.mT * (WIDTH // HEADS) ** -0.5, -1) @ v
        x = x + gate[:, None] * linear(f"{name}.attn.proj", attended.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"{name}.mlp.fc1", modulated(x, shift_mlp, scale_mlp)), approximate="tanh")
        x = x + gate_mlp[:, None] * linear(f"{name}.mlp.fc2", hidden)

    shift, scale = linear("final_layer.adaLN_modulation.1", condition).chunk(2, 1)
    out = linear("final_layer.linear", modulated(x, shift, scale)).unflatten(1, (rows, columns))
    return out.unflatten(-1, (PATCH, PATCH, -1)).permute(0, 5, 1, 3, 2, 4).reshape(len(out), -1, *image.shape[2:])


def for_the_kit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the kit's names; patches are flattened by channel first, of the input and of the output."""
    renamed = {
        "x_embedder.proj": "patch_embedding", "t_embedder.mlp.0": "time_embedding.linear_1",
        "t_embedder.mlp.2": "time_embedding.linear_2", "y_embedder.embedding_table": "label_embedding",
        "final_layer.linear": "output", "final_layer.adaLN_modulation.1": "modulation",
        "attn": "attention", "mlp.fc1": "ffn.expand", "mlp.fc2": "ffn.reduce", "adaLN_modulation.1": "modulation",
    }  # fmt: skip
    found = {}
    for name, weight in weights.items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        found[name] = weight
    found["patch_embedding.weight"] = found["patch_embedding.weight"].flatten(1)
    for name in ("output.weight", "output.bias"):
        found[name] = found[name].unflatten(0, (PATCH**2, -1)).transpose(0, 1).flatten(0, 1)
    return found


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_dits_weights_give_dits_output(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    config = config_of(
        "dit", "tiny", dim=WIDTH, num_heads=HEADS, depth=BLOCKS, num_classes=CLASSES, in_channels=CHANNELS
    )
    weights, network = dits_weights(), DiffusionTransformer(config).double()
    network.load_state_dict(for_the_kit(weights))
    image = torch.randn(3, CHANNELS, *size, dtype=torch.float64)
    timestep, label = torch.tensor([0, 17, 999]), torch.tensor([1, 4, CLASSES])
    expected = dit(weights, image, timestep, label)
    assert expected.std() > 0.1
    # The kit's angles of the times, up to 999, are of float32.
    torch.testing.assert_close(network(image, timestep, label), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows, columns, dim", [(16, 16, 384), (3, 64, 512), (32, 32, 4)])
def test_the_positions_are_dits(rows: int, columns: int, dim: int) -> None:
    table = position_embedding((rows, columns), dim, torch.device("cpu"))
    expected = torch.from_numpy(dits_positions(dim, rows, columns)).float()
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-5)


def test_the_transcription_tells_tables_apart() -> None:
    """Its output depends on where a patch is."""
    torch.manual_seed(0)
    weights, image = dits_weights(), torch.randn(1, CHANNELS, 8, 8, dtype=torch.float64)
    out = [dit(weights, picture, torch.tensor([5]), torch.tensor([1])) for picture in (image, image.mT)]
    assert not torch.allclose(out[0], out[1].mT, rtol=0.1, atol=0.1)
