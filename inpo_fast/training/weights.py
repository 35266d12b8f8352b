"""The policy's weights on disk as stock diffusers reads them: a LoRA file or a folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LORA = "pytorch_lora_weights.safetensors"
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights on the CPU, gathered where they are sharded: all processes must call it,
    and then only the main process gets them. Frozen weights are left out, buffers are not."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return dict(get_model_state_dict(model, options=_gathered()))  # type: ignore[arg-type]


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool
) -> dict[str, Any]:
    """The optimiser's state; all processes must call it."""
    if not sharded:
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_gathered())
    return state


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, sharded: bool
) -> None:
    """Set what `optimizer_state` returned."""
    if not sharded:
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state, options=_gathered())


def _gathered() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def save_denoiser(folder: Path, model: Any, state: dict[str, Tensor]) -> None:
    """A folder for `from_pretrained`: config and weights, in the dtype that they have."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model.save_config(folder)
    contiguous = {name: value.contiguous() for name, value in state.items()}
    save_file(contiguous, folder / _WEIGHTS, metadata={"format": "pt"})


def load_denoiser(folder: Path, model: nn.Module) -> None:
    """Read what `save_denoiser` wrote into `model`."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / _WEIGHTS))


def save_lora(
    folder: Path, pipeline: str, component: str, model: Any, state: dict[str, Tensor]
) -> None:
    """`pytorch_lora_weights.safetensors` for `load_lora_weights`, with rank and alpha as metadata.

    Args:
        folder: is made if it is missing.
        pipeline: class of the pipeline.
        component: of the pipeline that has the adapters.
        model: with the adapters.
        state: its weights, gathered.
    """
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(model, state_dict=state)
    metadata = _collate_lora_metadata({component: model})
    for adapter in metadata.values():
        # names in a set would come in another order in every process, and no file equal another
        adapter.update({k: sorted(v) for k, v in adapter.items() if isinstance(v, set)})
    _pipeline_class(pipeline).save_lora_weights(
        folder,
        **{f"{component}_lora_layers": {k: v.contiguous() for k, v in layers.items()}},
        **metadata,
    )


def load_lora(folder: Path, pipeline: str, component: str, model: nn.Module) -> None:
    """Read what `save_lora` wrote into the adapters of `model`."""
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft.utils import set_peft_model_state_dict

    found = _pipeline_class(pipeline).lora_state_dict(folder)
    layers = found[0] if isinstance(found, tuple) else found
    prefix = f"{component}."
    own = {k.removeprefix(prefix): v for k, v in layers.items() if k.startswith(prefix)}
    unread = set_peft_model_state_dict(model, convert_unet_state_dict_to_peft(own))
    if unread is not None and unread.unexpected_keys:
        raise ValueError(f"{folder / LORA} has layers that the model has not: {unread}")


def save_kohya(path: Path, lora: Path) -> None:
    """The LoRA with kohya's names."""
    from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
    from safetensors.torch import load_file, save_file

    layers: dict[str, Tensor] = convert_state_dict_to_kohya(
        convert_all_state_dict_to_peft(load_file(lora))
    )
    save_file({k: v.to(torch.float32).contiguous() for k, v in layers.items()}, path)


def _pipeline_class(name: str) -> Any:
    return getattr(importlib.import_module("diffusers"), name)
