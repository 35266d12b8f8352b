"""What a training step receives: `PairBatch`, the same from live, cached and in-memory pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairBatch:
    """P preference pairs of one image size, encoded.

    Attributes:
        latents: [2P, C, h, w] float32 x_0 as the denoiser expects it, (mean + std·ε − shift)·scale
            of the autoencoder's posterior; all winners first, then all losers, pair p at p and
            P + p.
        text: float32 conditioning of each pair, [P, …] by the name that diffusers gives it:
            `prompt_embeds` [P, L, D], and where the model has one `pooled_prompt_embeds` [P, D].
            A dropped caption has the embeddings of the empty prompt.
        time_ids: [2P, 6] float32, SDXL's original height and width, top and left of the crop,
            target height and width of every image in the order of `latents`; None for a model
            without them.
        label: [P] float32, the probability that the winner is the better one: 1, or 0.5 for a tie
            that was kept (`ties="soft"`), whose winner is only its first image.
        index: [P] int64, the row of each pair in its source.
        epoch: the pass over the data that the batch belongs to.
    """

    latents: Tensor
    text: dict[str, Tensor]
    time_ids: Tensor | None
    label: Tensor
    index: Tensor
    epoch: int

    def __len__(self) -> int:
        return len(self.label)

    @property
    def paired_text(self) -> dict[str, Tensor]:
        """[2P, …] `text` in the order of `latents`: winner and loser share their caption."""
        return {name: torch.cat([value, value]) for name, value in self.text.items()}

    def to(self, device: torch.device | str) -> PairBatch:
        """The batch on `device`, without waiting for the copy where its memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PairBatch:
        """The batch in page-locked memory; the data loader calls it."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        return PairBatch(
            change(self.latents),
            {name: change(value) for name, value in self.text.items()},
            None if self.time_ids is None else change(self.time_ids),
            change(self.label),
            change(self.index),
            self.epoch,
        )
