"""What tells a model from another: its configuration, every bit of its weights, and their dtypes.

With w_i the weights of a tensor as 64-bit words, the checksum is Σ w_i (2 i K + 1) mod 2^64 for a
fixed K. It is computed where the weights are, has the same value on every device, and any change
of one word changes it, because an odd factor is invertible.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

_STEP = 0x3C6EF372FE94F82A
"""2 K, even and below 2^63."""

_CHUNK = 2**17
_LAYERS, _QKV = "with fused layers", "with fused QKV"
_FUSED = {_LAYERS: "fuse_layers", _QKV: "fuse_qkv_projections"}
"""Ways to compute the same in other roundings, and the calls that choose them."""


class Fingerprint(NamedTuple):
    """Of a model.

    Attributes:
        checksum: SHA-256 over class, configuration, adapters, attention processors and the
            checksums of all weights and buffers.
        dtypes: of its parameters, to say what is different (the checksum covers them too), and
            whether its layers or its projections of attention are fused.
    """

    checksum: str
    dtypes: str


def fingerprint(module: nn.Module) -> Fingerprint:
    """The fingerprint of a model.

    Computed anew each time: a change through `weight.data`, as of an adapter that is fused and then
    unloaded, leaves neither a version nor another address behind.
    """
    module = getattr(module, "_orig_mod", module)
    switches = list(_switches(module))
    config = getattr(module, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    # where it came from and who wrote it does not matter
    settings = {
        k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"
    }
    sums = {n: [str(t.dtype), list(t.shape), _checksum(t)] for n, t in _weights(module)}
    data = json.dumps(
        [type(module).__name__, settings, switches, sums], sort_keys=True, default=str
    )
    return Fingerprint(hashlib.sha256(data.encode()).hexdigest(), _dtypes(module))


def check_dtypes(
    name: str, made: Mapping[str, Fingerprint], modules: Mapping[str, nn.Module]
) -> None:
    """Refuse models that have been in other dtypes, or whose layers were or were not fused.

    Args:
        name: of what was made with them.
        made: their fingerprints then.
        modules: as they are now, by the same names.

    Raises:
        ValueError: naming models and dtypes.
    """
    cast: dict[tuple[str, str], list[str]] = {}
    for part in sorted(made.keys() & modules.keys()):
        then, now = made[part].dtypes, _dtypes(modules[part])
        if then != now:
            cast.setdefault((then, now), []).append(part)
    if cast:
        said = " and ".join(
            f"{', '.join(parts)} in {then}, which the pipeline has in {now}"
            for (then, now), parts in cast.items()
        )
        remedy = "use the same dtype (inpo-fast: --dtype)"
        for way, call in _FUSED.items():
            if way in said:
                remedy += f", and {call} for both or for neither"
        raise ValueError(f"{name} was made with {said}: {remedy}")


def _dtypes(module: nn.Module) -> str:
    floating = {str(p.dtype) for p in module.parameters() if p.is_floating_point()}
    told = ", ".join(sorted(dtype.removeprefix("torch.") for dtype in floating))
    parts = list(module.modules())
    if any(getattr(part, "is_fused", False) for part in parts):
        told += f" {_LAYERS}"
    return f"{told} {_QKV}" if any(map(_projects_once, parts)) else told


def _projects_once(part: nn.Module) -> bool:
    """Whether an attention has one product for query, key and value.

    It says so, and no longer when that is taken back; diffusers' older ones change their processor.
    """
    if isinstance(part, Attention):
        return type(part.processor).__name__.startswith("Fused")
    return bool(getattr(part, "fused_projections", False))


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name; those that are offloaded one by one from where they lie."""
    for prefix, part in module.named_modules():
        hook = getattr(part, "_hf_hook", None)
        kept = getattr(hook, "weights_map", None)
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if tensor.is_meta:
                if kept is None:
                    raise ValueError(f"weight {prefix}.{name} has no data")
                tensor = kept[name]
            yield f"{prefix}.{name}", tensor.detach()


def _switches(module: nn.Module) -> Iterator[tuple[str, str]]:
    """What changes the model without changing a weight: adapters on and off, FreeU, and how
    attention is computed."""
    for name, part in module.named_modules():
        freeu = {
            k: v for k in ("s1", "s2", "b1", "b2") if (v := getattr(part, k, None)) is not None
        }
        if freeu:
            yield name, repr(freeu)
        if hasattr(part, "processor"):
            yield name, type(part.processor).__name__
        if hasattr(part, "active_adapters") and hasattr(part, "scaling"):
            merged = getattr(part, "merged_adapters", [])
            off = getattr(part, "disable_adapters", False)
            state = (list(part.active_adapters), dict(part.scaling), list(merged), off)
            yield name, repr(state)


def _checksum(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    data = tensor.contiguous().view(-1).view(torch.uint8)
    if padding := -data.numel() % 8:
        data = torch.cat([data, data.new_zeros(padding)])
    elif data.storage_offset() % 8:
        data = data.clone()
    words = data.view(torch.int64)
    factors = torch.arange(min(_CHUNK, len(words)), device=words.device) * _STEP + 1
    total = words.new_zeros(())
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK]
        # the factors of this chunk are those of the first plus start · step
        shift = words.new_tensor(start) * _STEP
        total += (chunk * factors[: len(chunk)]).sum() + shift * chunk.sum()
    return int(total)
