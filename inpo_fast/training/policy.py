"""The policy that is trained, and the reference that it is compared with.

The reference is a second tree of modules. With a LoRA it shares every tensor of the policy and has
no adapters: one copy of the weights, and nothing is switched on or off, so it is safe beside
compiled graphs, checkpointed activations and wrappers of the policy. Trained as a whole, the policy
is float32 and the reference a copy that stays, whose matrices are in the precision of the model
calls. Under autocast both compute from the same numbers, and at the start their outputs have the
same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ..ops.choice import resolve
from .config import ConfigError

_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Whose weights autocast rounds at every call. Norms it computes in float32."""


def twin(model: nn.Module) -> nn.Module:
    """A second tree of the same modules that shares all parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def rounded(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], None]]:
    """A second tree with matrices in `dtype`, and what rounds the model's into them once more.

    It shares what is not rounded, and under autocast its outputs have the bits of the model's.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    given: list[Tensor] = []
    kept: list[Tensor] = []
    for module in model.modules():
        if not isinstance(module, _MATRICES):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dtype != dtype:
                given.append(parameter.detach())
                kept.append(parameter.detach().to(dtype))
                tensors[id(parameter)] = nn.Parameter(kept[-1], requires_grad=False)
    return copy.deepcopy(model, tensors), partial(torch._foreach_copy_, kept, given)


def restore_forward(model: nn.Module, own: Callable[..., Any] | None) -> None:
    """Take accelerate's autocast from a model, which would end at its wrapper: inversion and
    reference bypass that.

    accelerate can do it, too, and takes diffusers' own decorators along, that of the scale of a
    LoRA among them.

    Args:
        own: the model's `forward` before it was prepared; None where that was its class's.
    """
    vars(model).pop("_original_forward", None)
    vars(model).pop("forward", None)
    if own is not None:
        model.forward = own


def full(
    model: nn.Module, dtype: torch.dtype, reference: nn.Module | None = None
) -> tuple[nn.Module, nn.Module]:
    """(policy, reference) where all weights are trained.

    Args:
        model: becomes the policy, in float32.
        dtype: of the model calls.
        reference: becomes the reference; None copies the policy.
    """
    model.float()
    reference = copy.deepcopy(model) if reference is None else reference.float()
    reference.requires_grad_(False)
    if dtype != torch.float32:
        # norms stay: of rounded weights they would differ from the policy's
        for module in reference.modules():
            if isinstance(module, _MATRICES):
                module.to(dtype)
    return model.requires_grad_(True), reference


def lora(
    model: Any, dtype: torch.dtype, *, rank: int, alpha: float, targets: Sequence[str], seed: int
) -> tuple[nn.Module, nn.Module]:
    """(policy, reference) where a LoRA of float32 is trained on weights of `dtype`.

    Args:
        model: gets the adapters.
        dtype: of the model calls and the frozen weights.
        rank, alpha, targets: of the adapters; B is zero, so that the policy starts as the model.
        seed: of A.

    Raises:
        ConfigError: no layer has such a name.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not any(name == t or name.endswith(f".{t}") for name in names for t in targets):
        raise ConfigError(
            f"lora_target_modules must name linear layers of the denoiser, got {', '.join(targets)}"
        )
    # not ModelMixin's own `to`, which warns of modules that there are not
    nn.Module.to(model.requires_grad_(False), dtype)
    reference = twin(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=alpha,
                init_lora_weights="gaussian",
                target_modules=list(targets),
            )
        )
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            # for `layers`, which then computes both in the same way
            vars(reference.get_submodule(name))["beside_adapter"] = True
    cast_training_params(model, dtype=torch.float32)
    return model, reference


def shard(model: nn.Module, blocks: Sequence[str]) -> None:
    """Spread a reference's weights over the processes (FSDP2), block by block, as the policy's are.

    Every process keeps those that `full` left in float32, the few of norms: FSDP2 takes one dtype
    where weights have a gradient, as `compile_model` lets those of a reference have.
    """
    from torch.distributed.fsdp import fully_shard

    dtype = max(model.parameters(), key=Tensor.numel).dtype
    whole = {p for p in model.parameters() if p.dtype != dtype}
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, ignored_params=whole)
    fully_shard(model, ignored_params=whole)


def gather_on_demand(model: nn.Module) -> None:
    """Let no module of a sharded model (FSDP2) gather another's weights ahead in a backward.

    It would those of the module before it in the forward. Before the first adapter of a LoRA that
    one has no backward, so that nobody uses what it gathers, and FSDP2 takes the memory back
    without waiting for the other processes. (It means to, in torch 2.11 to 2.13, but `wait_event`
    of `torch.accelerator`'s stream does not know of an event of `torch.cuda`.) Whatever is gathered
    next may be overwritten. What this costs: a LoRA's backward waits for each gather, where it
    would overlap it with computation.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            # an empty list would mean the default; its own weights are there already
            module.set_modules_to_backward_prefetch([module])


def fuse_layers(model: nn.Module, device: torch.device, *, sharded: bool) -> None:
    """`layers.fuse_layers`, or the config's error.

    Args:
        device: of the model.
        sharded: whether the weights will be spread over processes; FSDP2 takes them in torch's own
            layout only.

    Raises:
        ConfigError: there are no Triton kernels for the device, nothing of the model fits them, or
            it is offloaded.
    """
    try:
        resolve("triton", device)
    except ValueError as error:
        raise ConfigError(f"fused_layers needs Triton: {error}") from error
    from .. import layers

    try:
        count = layers.fuse_layers(model, channels_last=not sharded)
    except ValueError as error:
        raise ConfigError(f"fused_layers: {error}") from error
    if not count:
        raise ConfigError("fused_layers needs a UNet of diffusers, got a model without its blocks")


def checkpoint_activations(model: Any) -> None:
    """Keep few activations of a diffusers model for its backward, which computes the others again.

    In training here nothing in a forward is random, as dropout is off, so no generator's state is
    kept for the second one. A CUDA graph could not read it.
    """

    def checkpointed(module: nn.Module, *given: Any) -> Any:
        keep = module.training
        return checkpoint(module.__call__, *given, use_reentrant=False, preserve_rng_state=keep)

    model.enable_gradient_checkpointing(checkpointed)


def compile_model(
    model: nn.Module, mode: str, blocks: Sequence[str], *, as_trained: bool = False
) -> None:
    """Compile in place, so that no name of a weight changes.

    Args:
        mode: `full`, or `blocks`: only modules of the classes `blocks`, which share their graphs.
        as_trained: let blocks without gradient be those of a model with it, of a copy of which
            these are. They are fused and partitioned alike then, and round alike. What they keep
            for a backward is dropped after every block.

    Raises:
        ConfigError: there is no such block.
    """
    parts = [model]
    if mode == "blocks":
        parts = [module for module in model.modules() if type(module).__name__ in blocks]
        if not parts:
            raise ConfigError(f"compile=blocks needs blocks of {', '.join(blocks)}, got none")
    # Every block has a graph for each of its shapes, with and without gradient, and all are kept
    # with the one function that calls a module. One too many must not fall back unnoticed.
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for part in parts:
        # Policy and reference may be fused differently. Rounding between operators, as without
        # compilation, they differ less: β magnifies what is left.
        part.compile(dynamic=False, options={"emulate_precision_casts": True})
    if as_trained and mode == "blocks":
        model.requires_grad_(True)
        for part in parts:
            _drop_gradient(part)


def _drop_gradient(part: Any) -> None:
    """Let a compiled module compute as in training, and its output begin anew."""
    compiled = part._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(
            Tensor, lambda y: y.detach().requires_grad_(), compiled(*args, **kwargs)
        )

    part._compiled_call_impl = call
