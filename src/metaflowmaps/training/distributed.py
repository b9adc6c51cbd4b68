r"""A step on many ranks: whose rows, whose weights, and how gradients become those of the whole batch.

**Rows.** A batch is a function of (seed, step), so every rank draws it whole and takes rows rank, rank + size, … Each
gets as many rows of the diagonal and as many of the consistency loss: the work is equal, and so is the order in which
the ranks call the network, which matters because a sharded network talks at every call. What does not divide is
refused. A row's loss depends on its own row alone and is divided by the size of the whole batch, so

    ∇L = Σ_ranks ∇ Σ_{own rows} ℓ_row / B,

a sum over ranks, not a mean.

**Weights.** With a copy each, gradients are summed after the backward pass, whatever it contained. Otherwise
``fully_shard`` keeps a part of each weight, gathers it where a block is called and sums gradients into parts; with more
ranks than parts, such groups hold copies (HSDP). Optimizer and average live on the parts.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from metaflowmaps.errors import InputError
from metaflowmaps.training.objective import diagonal_rows
from metaflowmaps.training.train_config import RunConfig, TrainConfig
from metaflowmaps.work import ranks

BUCKET = 2**25  # numbers that are summed over the ranks in one go


def check_division(config: RunConfig, size: int) -> None:
    """Refuse what cannot be divided among so many ranks equally."""
    ranks_a_copy(config, size)
    sizes = {"batch_size": config.batch_size}
    if isinstance(config, TrainConfig) and config.teacher == "learned":
        sizes["drift_batch_size"] = config.drift_batch_size
    for name, rows in sizes.items():
        if rows % size:
            down, up = rows // size * size, -(-rows // size) * size
            fits = f"{down} or {up}" if down else f"{up}"
            raise InputError(f"{size} ranks cannot share {name}={rows} equally: --set {name}={fits}")
    if not isinstance(config, TrainConfig):
        return
    for step in (0, config.steps - 1):  # before and after a warm-up
        rows = diagonal_rows(config.loss, config.batch_size, step)
        if rows % size:
            near = round(rows / size) * size / config.batch_size
            raise InputError(
                f"{size} ranks cannot share the {rows} of {config.batch_size} rows that are on the diagonal equally: "
                f"--set loss.diagonal_share={near:g}"
            )


def ranks_a_copy(config: RunConfig, size: int) -> int:
    """How many ranks share a copy of the weights: 1 is a copy each."""
    shard = min(config.shard, size) or size
    if size % shard:
        raise InputError(
            f"shard={config.shard} does not divide {size} ranks: --set shard=0 (one copy), shard=1 (a copy each) or a "
            f"divisor of {size}"
        )
    if config.optimizer.name == "soap" and shard > 1:
        if config.shard:
            raise InputError(
                "optimizer.name=soap needs whole matrices: --set shard=1 (a copy each) or --set optimizer.name=adam"
            )
        return 1
    return shard


def told(config: RunConfig, size: int) -> str:
    """How a run is spread, in words."""
    shard = ranks_a_copy(config, size)
    if shard == 1:
        why = ", as soap needs whole matrices" if config.optimizer.name == "soap" and not config.shard else ""
        return f"{size} ranks, a copy of the weights each{why}"
    return f"{size} ranks, {size // shard} {'copy' if size == shard else 'copies'} of the weights"


def share(batch: Any) -> Any:
    """This rank's rows of a batch."""
    size = ranks.size()
    if size == 1:
        return batch
    if not hasattr(batch, "share"):
        raise InputError("the batches of this objective cannot be shared among ranks: run it without torchrun")
    return batch.share(ranks.rank(), size)


def spread(model: nn.Module, config: RunConfig, device: torch.device) -> int:
    """Shard the model's network in place, if it is to be; how many ranks share a copy."""
    size = ranks.size()
    shard = ranks_a_copy(config, size)
    if shard == 1:
        return 1
    from torch.distributed.device_mesh import init_device_mesh  # these take long to import
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if shard == size:
        mesh = init_device_mesh(device.type, (size,))
    else:  # ranks with consecutive numbers, neighbours on a node, share a copy
        mesh = init_device_mesh(device.type, (size // shard, shard), mesh_dim_names=("replicate", "shard"))
    # true and harmless: what a network returns is never changed in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    network = getattr(model, "network", model)
    for block in _blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for module in network.modules():
        if isinstance(module, FSDPModule):  # sums, not means: the loss is divided by the whole batch already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return shard


def _blocks(network: nn.Module) -> list[nn.Module]:
    """What a network is a sequence of: the members of its module lists."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    members = [part for each in lists for part in each if not isinstance(part, nn.ModuleList)]
    return [part for part in members if next(part.parameters(), None) is not None]


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Sum over the ranks the gradients of weights of which each has a copy."""
    bucket: list[Tensor] = []
    for gradient in [p.grad for p in parameters if p.grad is not None]:
        if bucket and (bucket[0].dtype != gradient.dtype or sum(g.numel() for g in bucket) > BUCKET):
            _sum(bucket)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _sum(bucket)


def _sum(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def clip(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """Scale the gradient of all ranks to at most ``limit``; its norm before, left where it is."""
    norm: Tensor = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()  # type: ignore[operator]
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
