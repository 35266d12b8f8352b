"""Encoded pairs: posterior and text embeddings are at hand, a batch only has to be sampled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .batch import PairBatch
from .loader import PairData, Randomness
from .order import Pick


class EncodedPair(NamedTuple):
    """A pair as it is stored, in any floating dtype."""

    mean: Tensor
    """[2, C, h, w] of the posteriors of winner and loser."""
    std: Tensor | None
    """[2, C, h, w], or None for a posterior that is one point."""
    text: Mapping[str, Tensor]
    """Conditioning by name, without a batch dimension."""
    time_ids: Tensor | None
    """[2, 6], or None."""
    label: float
    row: int
    """Of the pair in its source."""


class Scaling(NamedTuple):
    """From the autoencoder's latents to the denoiser's: (z − shift)·scale, each [C] float32."""

    shift: Tensor
    scale: Tensor

    @classmethod
    def of(cls, config: Any, channels: int | None = None) -> Scaling:
        """Read an autoencoder's config: scaling and shift factor, mean and deviation of latents."""
        channels = config.latent_channels if channels is None else channels

        def value(name: str, default: float) -> Tensor:
            given = getattr(config, name, None)
            given = default if given is None else given
            return torch.as_tensor(given, dtype=torch.float32).flatten().expand(channels)

        mean = value("latents_mean", 0.0) + value("shift_factor", 0.0)
        return cls(mean, value("scaling_factor", 1.0) / value("latents_std", 1.0))

    def sample(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """(mean + std·ε − shift)·scale of [..., C, h, w], in float32."""
        return self.scaled(mean.float() + std.float() * noise)

    def scaled(self, latents: Tensor) -> Tensor:
        """(z − shift)·scale of [..., C, h, w] float32."""
        shift, scale = (value[:, None, None].to(latents.device) for value in self)
        return (latents - shift) * scale


class EncodedPairs(PairData):
    """Pairs whose latents and embeddings are stored; no encoder is needed."""

    scaling: Scaling
    flips: bool
    """Whether mirrored images are stored too; then every pair is mirrored in half of the epochs."""

    @abstractmethod
    def read(self, position: int, *, flipped: bool, empty_prompt: bool) -> EncodedPair:
        """The pair at `position`, mirrored or not, with its caption or the empty prompt."""

    def _items(self, randomness: Randomness) -> Dataset[Any]:
        return _Samples(self, randomness)

    def _finish(self, items: Any, randomness: Randomness, device: torch.device) -> PairBatch:
        batch: PairBatch = items
        return batch.to(device)

    @staticmethod
    def _collate(items: list[Any]) -> PairBatch:
        return collate(items)


class MemoryPairs(EncodedPairs):
    """Encoded pairs in memory, of one image size.

    Args:
        mean: [N, 2, C, h, w] posterior means of winners and losers.
        std: the same of the deviations; None stands for zeros: nothing is drawn.
        text: [N, …] conditioning by name.
        scaling: see `Scaling`; None for latents that are the denoiser's already.
        empty_text: the empty prompt's, [...] by the same names; needed to drop captions.
        time_ids: [N, 2, 6], or None.
        label: [N] probability that the winner is the better one; None for ones.
    """

    flips = False

    def __init__(
        self,
        mean: Tensor,
        std: Tensor | None,
        text: Mapping[str, Tensor],
        *,
        scaling: Scaling | None = None,
        empty_text: Mapping[str, Tensor] | None = None,
        time_ids: Tensor | None = None,
        label: Tensor | None = None,
    ) -> None:
        if mean.ndim != 5 or mean.shape[1] != 2:
            raise ValueError(f"mean must have the shape [N, 2, C, h, w], got {tuple(mean.shape)}")
        if std is not None and std.shape != mean.shape:
            raise ValueError(
                f"std must have the shape of mean, {tuple(mean.shape)}, got {tuple(std.shape)}"
            )
        given = {**text, "time_ids": time_ids, "label": label}
        for name, value in given.items():
            if value is not None and len(value) != len(mean):
                raise ValueError(
                    f"{name} must have an entry for each of {len(mean)} pairs, got {len(value)}"
                )
        if label is not None and not bool(((label >= 0) & (label <= 1)).all()):
            raise ValueError(
                f"label must be probabilities, in [0, 1], got {label.min()} … {label.max()}"
            )
        if empty_text is not None and empty_text.keys() != text.keys():
            raise ValueError(
                f"empty_text must have the names of text, {sorted(text)}, got {sorted(empty_text)}"
            )
        channels = mean.shape[2]
        identity = Scaling(torch.zeros(channels), torch.ones(channels))
        self.scaling = identity if scaling is None else scaling
        self._mean, self._std, self._text = mean, std, dict(text)
        self._empty, self._time_ids = empty_text, time_ids
        self._label = torch.ones(len(mean)) if label is None else label

    @property
    def buckets(self) -> Sequence[int]:
        return [0] * len(self._mean)

    @property
    def sure(self) -> bool:
        return bool((self._label == 1).all())

    def read(self, position: int, *, flipped: bool, empty_prompt: bool) -> EncodedPair:
        mean = self._mean[position]
        text: Mapping[str, Tensor] = {name: t[position] for name, t in self._text.items()}
        if empty_prompt:
            if self._empty is None:
                raise ValueError("empty_text must be given where captions are dropped, got None")
            text = self._empty
        return EncodedPair(
            mean,
            None if self._std is None else self._std[position],
            text,
            None if self._time_ids is None else self._time_ids[position],
            float(self._label[position]),
            position,
        )


class Sample(NamedTuple):
    """A pair of a batch before the pairs are stacked, float32."""

    latents: Tensor  # [2, C, h, w]
    text: dict[str, Tensor]
    time_ids: Tensor | None  # [2, 6]
    label: float
    row: int
    epoch: int


class _Samples(Dataset[Any]):
    def __init__(self, pairs: EncodedPairs, randomness: Randomness) -> None:
        self.pairs, self.randomness = pairs, randomness

    def __getitem__(self, pick: Pick) -> Sample:
        pair = self.pairs.read(
            pick.position,
            flipped=self.pairs.flips and self.randomness.flip(pick),
            empty_prompt=self.randomness.drop_caption(pick),
        )
        scaling = self.pairs.scaling
        if pair.std is None:
            latents = scaling.scaled(pair.mean.float())
        else:
            noise = self.randomness.posterior_noise(pick, tuple(pair.mean.shape))
            latents = scaling.sample(pair.mean, pair.std, noise)
        return Sample(
            latents,
            {name: value.float() for name, value in pair.text.items()},
            pair.time_ids,
            pair.label,
            pair.row,
            pick.epoch,
        )


def collate(samples: Sequence[Sample]) -> PairBatch:
    """Stack pairs, winners first and then losers."""
    latents = torch.stack([sample.latents for sample in samples], dim=1)  # [2, P, C, h, w]
    time_ids = None
    if samples[0].time_ids is not None:
        stacked = torch.stack([s.time_ids for s in samples if s.time_ids is not None], dim=1)
        time_ids = stacked.flatten(0, 1).float()
    return PairBatch(
        latents.flatten(0, 1),
        {name: torch.stack([s.text[name] for s in samples]) for name in samples[0].text},
        time_ids,
        torch.tensor([sample.label for sample in samples], dtype=torch.float32),
        torch.tensor([sample.row for sample in samples]),
        samples[0].epoch,
    )
