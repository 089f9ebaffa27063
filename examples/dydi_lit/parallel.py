"""One network on many processes: whole on each (DDP), or sharded over them (FSDP2).

accelerate starts the processes and makes the DDP. Its FSDP2 is for GPUs only, and neither averages weights nor
restores them on another number of processes, so that the few calls to `fully_shard` are made here. Both compute in
autocast with weights, gradients and their sums over processes in float32, which makes them the same to rounding.
"""

from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from examples.dydi_lit.model import DiffusionTransformer

Parallel = Literal["ddp", "fsdp2"]


def processes() -> PartialState:
    """Which process of how many this is, and its device."""
    # Without being told, accelerate takes processes on CPUs for runs of their own.
    return PartialState(cpu=not torch.accelerator.is_available())


def parallelise(
    network: DiffusionTransformer, averaged: DiffusionTransformer, parallel: Parallel, accelerator: Accelerator
) -> nn.Module:
    """The module to train `network` through; to call before the optimiser is made.

    All processes hold the same weights before. "fsdp2" shards `averaged` likewise; on one process it changes nothing.
    """
    if parallel == "ddp" or accelerator.num_processes == 1:
        return accelerator.prepare_model(network)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for model in (network, averaged):
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return network


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards, or the tensor itself; for all processes to call at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, whole and on the CPU; for all processes to call at once."""
    return {name: _to_save(tensor) for name, tensor in model.state_dict().items()}


def gather_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors as <parameter>.<moment>, whole and on the CPU; for all processes to call at once."""
    return {
        f"{name}.{moment}": _to_save(tensor)
        for name, parameter in model.named_parameters()
        for moment, tensor in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """The inverse of `gather_moments`; the optimiser may be sharded otherwise than the one the moments are of."""
    parameters = dict(model.named_parameters())
    for key, tensor in moments.items():
        name, moment = key.rsplit(".", 1)
        optimizer.state[parameters[name]][moment] = _like(parameters[name], tensor)


def _to_save(tensor: Tensor) -> Tensor:
    """A copy, because a whole tensor may be a view of its shards with padding, which safetensors does not write."""
    return whole(tensor).detach().cpu().clone(memory_format=torch.contiguous_format)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` on the device of `parameter`, and sharded as it is; AdamW's count of steps stays as it is."""
    if value.dim() == 0:
        return value
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
