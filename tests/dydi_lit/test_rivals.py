"""The layers of PixArt-Sigma, EDiT, DiG, LiT and MoH-DiT, each against its equations written out naively."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("examples.dydi_lit")

from torch import Tensor, nn

from examples.dydi_lit import dig
from examples.dydi_lit.configs import config_of
from examples.dydi_lit.dig import GatedLinearAttention, IdentityConvolution, SwiGLU, chunked, scan_order
from examples.dydi_lit.edit import LinearCompressedAttention
from examples.dydi_lit.layers import relu_attention
from examples.dydi_lit.lit import ConvolvedLinearAttention
from examples.dydi_lit.model import DiffusionTransformer
from examples.dydi_lit.moh_dit import MixtureOfHeads
from examples.dydi_lit.pixart_sigma import CompressedAttention

GRID = (3, 5)
DIM = 16


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, GRID[0] * GRID[1], DIM)


def attend(weights: Tensor, v: Tensor) -> Tensor:
    """Rows of `weights` (B, N, M), divided by their sums, times v (B, M, e)."""
    return weights @ v / weights.sum(-1, keepdim=True)


def convolved(x: Tensor, weight: Tensor, bias: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """A depth-wise convolution (d, 1, s, s) centred on the given rows and columns, one product after the other."""
    image, reach = x.unflatten(1, GRID), weight.shape[-1] // 2
    out = bias.expand(len(x), len(rows), len(columns), -1).clone()
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            for down in range(-reach, reach + 1):
                for across in range(-reach, reach + 1):
                    r, c = row + down, column + across
                    if 0 <= r < GRID[0] and 0 <= c < GRID[1]:
                        out[:, i, j] += image[:, r, c] * weight[:, 0, down + reach, across + reach]
    return out.flatten(1, 2)


# --- linear attention


@pytest.mark.parametrize("queries, keys", [(3, 20), (20, 3), (12, 12), (4, 4)])
def test_relu_attention_in_either_order(queries: int, keys: int) -> None:
    q, k, v = (torch.randn(2, count, 8) for count in (queries, keys, keys))
    expected = torch.cat(
        [attend(q[..., s].relu() @ k[..., s].relu().mT, v[..., s]) for s in (slice(4), slice(4, 8))], -1
    )
    torch.testing.assert_close(relu_attention(q, k, v, 2), expected.nan_to_num(0), rtol=1e-4, atol=1e-6)


def test_linear_attention_sums_in_float32_under_autocast(x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        mixed = relu_attention(x, x, x, 2)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, relu_attention(x, x, x, 2))


def test_lit_adds_a_convolution_of_the_values(x: Tensor) -> None:
    layer = ConvolvedLinearAttention(DIM, 2)
    q, k, v = layer.qkv(x).chunk(3, -1)
    heads = [attend(q[..., s].relu() @ k[..., s].relu().mT, v[..., s]) for s in (slice(8), slice(8, 16))]
    local = convolved(v, layer.depthwise.weight, layer.depthwise.bias, [0, 1, 2], [0, 1, 2, 3, 4])  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x, GRID), layer.proj(torch.cat(heads, -1) + local), rtol=1e-4, atol=1e-5)


def test_edit_compresses_keys_and_gathers_queries(x: Tensor) -> None:
    layer = LinearCompressedAttention(DIM, 1)
    padded = F.pad(x.unflatten(1, GRID), (0, 0, 1, 1, 1, 1))
    windows = torch.stack([padded[:, i : i + GRID[0], j : j + GRID[1]] for i in range(3) for j in range(3)], -1)
    gathered = torch.einsum("bhwdt,edt->bhwe", windows, layer.gather.weight.flatten(2)) + layer.gather.bias
    narrow = F.layer_norm(gathered.flatten(1, 2), (DIM // 2,))
    q = layer.query(x + layer.widen(torch.where(narrow > 0, narrow, 0.01 * narrow)))
    k, v = layer.key_value(x).chunk(2, -1)
    k, v = (
        convolved(t, part.weight, part.bias, [0, 2], [0, 2, 4])  # type: ignore[arg-type]
        for t, part in ((k, layer.compress_k), (v, layer.compress_v))
    )
    assert k.shape[1] == 6
    expected = layer.proj(attend(q.relu() @ k.relu().mT, v))
    torch.testing.assert_close(layer(x, GRID), expected, rtol=1e-4, atol=1e-5)


# --- softmax attention


@pytest.mark.parametrize("trained", [False, True])
def test_pixart_compresses_keys_and_values(x: Tensor, trained: bool) -> None:
    """A grid of 3 x 5 gives 2 x 3 keys, those at the border of copies of the last row and column."""
    layer = CompressedAttention(DIM, 2, 2)
    if trained:
        nn.init.normal_(layer.compress.weight)
        nn.init.normal_(layer.compress.bias)  # type: ignore[arg-type]
    weight = layer.compress.weight[:, 0] if trained else torch.full((DIM, 2, 2), 0.25)
    bias = layer.compress.bias if trained else torch.zeros(DIM)
    q, k, v = layer.qkv(x).chunk(3, -1)

    def compressed(t: Tensor) -> Tensor:
        image = t.unflatten(1, GRID)
        keys = []
        for row in (0, 2):
            for column in (0, 2, 4):
                places = [(min(row + i, 2), min(column + j, 4), weight[:, i, j]) for i in (0, 1) for j in (0, 1)]
                keys.append(sum((image[:, r, c] * w for r, c, w in places), bias))
        return F.layer_norm(torch.stack(keys, 1), (DIM,))  # type: ignore[arg-type]

    k, v = compressed(k), compressed(v)
    heads = [torch.softmax(q[..., s] @ k[..., s].mT / 8**0.5, -1) @ v[..., s] for s in (slice(8), slice(8, 16))]
    torch.testing.assert_close(layer(x, GRID), layer.proj(torch.cat(heads, -1)), rtol=1e-4, atol=1e-5)


def test_pixart_compresses_in_the_last_blocks() -> None:
    kinds = [type(block.attention).__name__ for block in DiffusionTransformer(config_of("pixart-sigma", "tiny")).blocks]
    assert kinds == ["SoftmaxAttention"] * 3 + ["CompressedAttention"] * 2


def test_moh_weighs_heads_and_omits_some(x: Tensor) -> None:
    layer = MixtureOfHeads(DIM, 4, shared_heads=1, taken_heads=2)
    q, k, v = (t.unflatten(-1, (4, 4)) for t in layer.qkv(x).chunk(3, -1))
    columns = layer.proj.weight.unflatten(1, (4, 4))
    expected = torch.zeros_like(x)
    for image in range(2):
        for n in range(x.shape[1]):
            token = x[image, n]
            kinds = torch.softmax(layer.kind_router.weight @ token, 0)
            logits = layer.routed_router.weight @ token
            taken = sorted(range(3), key=lambda h: -logits[h])[:2]
            masses = logits.exp()
            gates = {0: 2 * kinds[0]}  # the softmax over a single shared head is 1
            gates |= {1 + h: 2 * kinds[1] * 2 * masses[h] / sum(masses[other] for other in taken) for h in taken}
            for h, gate in gates.items():
                head = torch.softmax(k[image, :, h] @ q[image, n, h] / 2, 0) @ v[image, :, h]
                expected[image, n] += gate * (columns[:, h] @ head)
    torch.testing.assert_close(layer(x, GRID), expected + layer.proj.bias, rtol=1e-4, atol=1e-5)


def test_moh_without_routers_is_softmax_attention(x: Tensor) -> None:
    """Even routers weigh every head in use by one; with all of them taken nothing is omitted."""
    layer = MixtureOfHeads(DIM, 4, shared_heads=2, taken_heads=2)
    for router in (layer.shared_router, layer.routed_router, layer.kind_router):
        nn.init.zeros_(router.weight)
    q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x, GRID), layer.proj(plain))


def test_the_balance_of_heads_is_its_formula(x: Tensor) -> None:
    layer = MixtureOfHeads(DIM, 4, shared_heads=1, taken_heads=2)
    layer(x, GRID)
    expected = 0.0
    for image in x:
        probabilities = torch.softmax(image @ layer.routed_router.weight.mT, 1)
        taken = [probabilities.topk(2, 1).indices.flatten().tolist().count(head) / len(image) for head in range(3)]
        expected += sum(share * float(probabilities[:, head].mean()) for head, share in enumerate(taken)) / len(x)
    balance = layer.take_balance()
    assert float(balance) == pytest.approx(expected)
    balance.backward()
    assert layer.routed_router.weight.grad is not None and layer.routed_router.weight.grad.any()
    for unable in (layer.eval(), layer.train()):
        with torch.set_grad_enabled(unable.training and False):
            unable(x, GRID)
        with pytest.raises(RuntimeError, match="there is no balance of heads"):
            layer.take_balance()


def test_the_balance_evens_the_use_of_heads(x: Tensor) -> None:
    layer = MixtureOfHeads(DIM, 4, shared_heads=1, taken_heads=1)
    x = x + 1
    nn.init.zeros_(layer.routed_router.weight)
    layer.routed_router.weight.data[0] = 0.5  # nearly all tokens take the first routed head

    def used() -> list[int]:
        return (layer.gates(x)[..., 1:] > 0).sum((0, 1)).tolist()

    before, optimizer = max(used()), torch.optim.SGD([layer.routed_router.weight], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        layer(x, GRID)
        layer.take_balance().backward()
        optimizer.step()
    assert before >= 25 > 18 > max(used())  # of 30 tokens; ten each would be even


@pytest.mark.parametrize("shared, taken", [(0, 2), (4, 1), (1, 0), (2, 3)])
def test_moh_needs_heads_of_both_kinds(shared: int, taken: int) -> None:
    with pytest.raises(ValueError, match=rf"of 4 heads at least one must be shared.*got {shared} and {taken}"):
        MixtureOfHeads(DIM, 4, shared, taken)


# --- gated linear attention


def recurrent(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor) -> Tensor:
    """The recurrence, a token at a time."""
    state, out = torch.zeros(*q.shape[::2], q.shape[3], v.shape[3], dtype=q.dtype), []
    for t in range(q.shape[1]):
        state = log_alpha[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append((q[:, t, :, :, None] * state).sum(-2) / q.shape[-1] ** 0.5)
    return torch.stack(out, 1)


def gated_inputs(length: int, fastest: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, length, 3, 4, dtype=dtype) for _ in range(3))
    return [t.requires_grad_() for t in (q, k, v, -fastest * torch.rand(2, length, 3, 4, dtype=dtype))]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("fastest", [0.0, 0.5, 500.0])
def test_chunks_are_the_recurrence(length: int, fastest: float) -> None:
    """With their gradients, also where a state is forgotten within a step."""
    inputs = gated_inputs(length, fastest)
    out, expected = chunked(*inputs), recurrent(*inputs)
    torch.testing.assert_close(out, expected)
    gradient = torch.randn_like(out)
    for found, right in zip(*(torch.autograd.grad(o, inputs, gradient) for o in (out, expected)), strict=True):
        torch.testing.assert_close(found, right)


def test_chunks_agree_with_flash_linear_attention() -> None:
    naive = pytest.importorskip("fla.ops.gla.naive")
    inputs = [t.detach() for t in gated_inputs(40, 0.5, torch.float32)]
    torch.testing.assert_close(chunked(*inputs), naive.naive_recurrent_gla(*inputs)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    dig.chunk_gla is None or not torch.cuda.is_available(), reason="needs flash-linear-attention, a GPU"
)
def test_its_kernel_agrees_with_the_chunks() -> None:
    inputs = [t.detach().cuda() for t in gated_inputs(256, 0.5, torch.float32)]
    torch.testing.assert_close(dig.Recurrence()(*inputs), chunked(*inputs), rtol=1e-2, atol=1e-2)


def test_scans_go_four_ways() -> None:
    scans = [scan_order((2, 3), scan, torch.device("cpu")).tolist() for scan in range(5)]
    assert scans == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0], scans[0]]


@pytest.mark.parametrize("scan", range(4))
def test_a_token_sees_what_came_before_it_in_the_scan(x: Tensor, scan: int) -> None:
    layer = GatedLinearAttention(DIM, 2, scan)
    order = scan_order(GRID, scan, x.device)
    other = x.clone()
    other[:, order[7]] += 1
    changed = (layer(x, GRID) != layer(other, GRID)).any(-1).any(0)
    assert set(changed.nonzero().flatten().tolist()) == set(order[7:].tolist())


def test_dig_is_its_equations(x: Tensor) -> None:
    layer = GatedLinearAttention(DIM, 2, 0)
    nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
    q, k, v = (t.unflatten(-1, (2, 8)) for t in layer.qkv(x).chunk(3, -1))
    alpha = torch.sigmoid(layer.decay(x)) ** (1 / 16)
    o = recurrent(q, k, v, alpha.log().unflatten(-1, (2, 8)))
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight
    gate = layer.gate(x)
    expected = layer.proj(normed.flatten(2) * gate * torch.sigmoid(gate))
    torch.testing.assert_close(layer(x, GRID), expected, rtol=1e-4, atol=1e-5)


def test_digs_other_layers(x: Tensor) -> None:
    convolution, ffn = IdentityConvolution(DIM), SwiGLU(DIM, 24)
    assert torch.equal(convolution(x, GRID), x)
    nn.init.normal_(convolution.weight)
    expected = convolved(x, convolution.weight, convolution.bias, [0, 1, 2], [0, 1, 2, 3, 4])  # type: ignore[arg-type]
    torch.testing.assert_close(convolution(x, GRID), expected)
    one, two = ffn.expand.weight.chunk(2)
    gate = x @ one.mT
    torch.testing.assert_close(ffn(x, GRID), (gate * torch.sigmoid(gate) * (x @ two.mT)) @ ffn.reduce.weight.mT)


def test_fresh_blocks_of_every_rival_are_the_identity() -> None:
    for model in ("pixart-sigma", "edit", "dig", "lit", "moh-dit"):
        network = DiffusionTransformer(config_of(model, "tiny"))  # type: ignore[arg-type]
        tokens = torch.randn(1, 6, network.config.dim)
        assert torch.equal(network.blocks[0](tokens, torch.randn(1, network.config.dim), (2, 3)), tokens)
