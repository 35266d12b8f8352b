# SPDX-License-Identifier: Apache-2.0
"""The rival of the training benchmark: a micro-step as the official InPO script runs it.

One pair, eager, float16 autocast around every call of a float32 policy, a float16 reference,
autoencoder and text encoders inside the step, its own inversion, and its reads of the loss. Left
out, in its favour: image files, the tokenizer, the loss scale, and copies of tables to the device.
Attention is torch's, where the script had xformers on the policy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

STEPS, TOTAL, ETA = 10, 1000, 0.1
Draw = Callable[[tuple[int, ...], torch.dtype], Tensor]


class Encoded(NamedTuple):
    """A pair as the networks are told it."""

    latents: Tensor  # [2, 4, h, w], winner first
    text: Tensor  # [2, 77, D]
    added: dict[str, Tensor] | None  # SDXL: text_embeds [2, D], time_ids [2, 6]


@dataclass
class Encoders:
    """The autoencoder and text encoders of an architecture with random weights.

    Attributes:
        image_side: pixels along a side of an image.
    """

    vae: Any
    texts: Sequence[Any]
    image_side: int

    @torch.no_grad()
    def __call__(self, pixels: Tensor, tokens: Tensor) -> Encoded:
        """Encode pixels [2P, 3, H, W] and tokens [P, 77]; captions are repeated for the losers."""
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        latents = posterior.sample() * self.vae.config.scaling_factor
        if len(self.texts) == 1:
            text = self.texts[0](tokens)[0]
            return Encoded(latents, torch.cat([text, text]), None)
        told = [encoder(tokens, output_hidden_states=True) for encoder in self.texts]
        text = torch.cat([one.hidden_states[-2] for one in told], dim=-1)
        side = self.image_side
        sizes = torch.tensor([side, side, 0, 0, side, side], device=text.device, dtype=text.dtype)
        pooled = told[-1].text_embeds
        added = {
            "text_embeds": torch.cat([pooled, pooled]),
            "time_ids": sizes.repeat(len(latents), 1),
        }
        return Encoded(latents, torch.cat([text, text]), added)


def encoders(name: str, device: str, dtype: torch.dtype) -> Encoders:
    """Return the encoders that belong to the UNet `name` of `benchmarks.models`."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    small, xl = name.endswith("-small"), name.startswith("sdxl")
    torch.manual_seed(3)
    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=(4, 4, 4, 4) if small else (128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1 if small else 2,
            norm_num_groups=4 if small else 32,
            latent_channels=4,
            scaling_factor=0.13025 if xl else 0.18215,
        )
        del vae.decoder  # the script has it in memory and does not call it
        widths = [(8, 1, 1), (8, 1, 1)] if small else [(768, 12, 12), (1280, 32, 20)]
        if small and not xl:
            widths = [(16, 1, 1)]
        texts = []
        for index, (width, layers, heads) in enumerate(widths[: 2 if xl else 1]):
            config = CLIPTextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                projection_dim=width,
                hidden_act="gelu" if index else "quick_gelu",
            )
            texts.append((CLIPTextModelWithProjection if index else CLIPTextModel)(config))
    for module in (vae, *texts):
        module.to(dtype).eval().requires_grad_(False)
    return Encoders(vae, texts, 64 if small else 1024 if xl else 512)


class OfficialStep:
    """The script's micro-step.

    Args:
        policy: float32, trained.
        reference: in `dtype`.
        table: [1000] ᾱ of the scheduler, float32, on the host.
        beta: β.
        dtype: `weight_dtype`: float16, or float32 to compare its loss.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        table: Tensor,
        beta: float,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.table, self.cast, self.beta, self.dtype = table, table.to(dtype), beta, dtype

    def called(self, x: Tensor, t: Tensor, pair: Encoded) -> Tensor:
        """The policy as accelerate wraps it: autocast inside, a float32 output."""
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.policy(x, t, pair.text, added_cond_kwargs=pair.added, return_dict=False)[
                0
            ]
        return output.float()

    @torch.no_grad()
    def inverted(self, pair: Encoded, timesteps: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """x_t and τ, [2, 4, h, w], at the timesteps [2] of the pair."""
        start = noisy = pair.latents.to(self.dtype)
        stride = TOTAL // STEPS
        sampled = int(timesteps[0].item())
        for t in range(1 - stride, TOTAL - stride, stride):
            if t >= sampled:
                break
            output = self.called(noisy, torch.full_like(timesteps, t), pair)
            now = self.table[max(t, 0)]
            following = self.table[t + stride]
            clean = (noisy - (1 - now) ** 0.5 * output) / now**0.5
            noisy = following**0.5 * clean + (1 - following) ** 0.5 * output
            before = self.cast[t] if t >= 0 else self.table[0]
            after = self.cast[t + stride]
            variance = (1 - before) / (1 - after) * (1 - after / before)
            noisy = noisy + ETA * draw(tuple(noisy.shape), self.dtype) * variance**0.5
        alpha = self.cast[sampled]
        return noisy.to(self.dtype), (noisy - start * alpha**0.5) / (1 - alpha) ** 0.5

    def loss(self, pair: Encoded, timesteps: Tensor, draw: Draw) -> Tensor:
        """The loss, [], read four times on the way as the script does for its logs."""
        noisy, target = self.inverted(pair, timesteps, draw)
        output = self.called(noisy, timesteps, pair)
        with torch.no_grad():
            added = pair.added and {k: v.to(self.dtype) for k, v in pair.added.items()}
            frozen = self.reference(
                noisy,
                timesteps,
                pair.text.to(self.dtype),
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
        winner, loser = (output.float() - target).square().mean(dim=(1, 2, 3))
        winner_ref, loser_ref = (frozen.float() - target).square().mean(dim=(1, 2, 3))
        inside = -0.5 * self.beta * ((winner - loser) - (winner_ref - loser_ref))
        loss = -functional.logsigmoid(inside)
        for logged in (winner + loser, winner_ref + loser_ref, inside > 0, loss):
            logged.item()
        return loss
