"""Where a run of a solver stands, in memory and on disk."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from . import ops
from .files import read_tensors, write_tensors
from .solvers.program import Ends

Pair: TypeAlias = "tuple[Tensor | None, Tensor | None]"

FLOAT_STATES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
StateKind = Literal["lattice", "float64", "float32", "float16", "bfloat16"]

_FORMAT = "inpo_fast.state/1"


@dataclass(frozen=True)
class State:
    """Where a run stands: both tracks, their information buffers and the position in the program.

    Attributes:
        tracks: two tensors [B, …], int32 on the lattice, else floating; None where a track is not
            in use.
        buffers: two int64 tensors [B, …] where the program scales lattice tracks, else None.
        scales: z per unit of each track, None where the track carries no sample.
        output: the track that carries the sample.
        position: number of updates done.
        frac_bits: K of the lattice, None for floating tracks.
        program: fingerprint of the program that ran.
        inverse: fingerprint of the program that undoes it, None where there is none and while the
            run is unfinished.
        status: the status words of the run that this state is a moment of, read by `save`; None
            once they have been checked.
    """

    tracks: Pair
    buffers: Pair
    scales: Ends
    output: int
    position: int
    frac_bits: int | None
    program: str
    inverse: str | None
    status: Tensor | None = field(default=None, repr=False)

    def sample(self) -> Tensor:
        """[B, …] the sample z that the output track carries, float32 (or the dtype of a floating
        state)."""
        track, scale = self.tracks[self.output], self.scales[self.output]
        assert track is not None and scale is not None
        if self.frac_bits is None:
            return track * scale
        unit = torch.tensor(scale, dtype=torch.float64, device=track.device)
        return ops.lattice_decode(track, unit, torch.float32, frac_bits=self.frac_bits)

    def equal(self, other: State) -> bool:
        """Whether both states carry the same bits, in tracks and buffers, wherever both hold
        something."""
        mine, theirs = self._tensors(), other._tensors()
        common = mine.keys() & theirs.keys()
        same = (self.output, self.frac_bits) == (other.output, other.frac_bits)
        same = same and all(torch.equal(mine[k], theirs[k]) for k in common)
        return same and f"track{self.output}" in common

    def clone(self) -> State:
        """A copy in memory of its own."""

        def copies(pair: Pair) -> Pair:
            first, second = (None if t is None else t.clone() for t in pair)
            return first, second

        # of the status too: what goes wrong later is no fault of this moment
        status = None if self.status is None else self.status.clone()
        return replace(
            self, tracks=copies(self.tracks), buffers=copies(self.buffers), status=status
        )

    def _tensors(self) -> dict[str, Tensor]:
        named = {}
        for j in (0, 1):
            if self.scales[j] is None:
                continue
            for name, tensor in (("track", self.tracks[j]), ("buffer", self.buffers[j])):
                if tensor is not None:
                    named[f"{name}{j}"] = tensor
        return named

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as safetensors, under a temporary name first; an interrupted write leaves
        nothing behind.

        Raises:
            OSError: it cannot be written.
            LatticeRangeError, NonFiniteError: the run has gone wrong before this moment.
        """
        tensors, fields = self.pack()
        write_tensors(Path(path), tensors, {"format": _FORMAT, **fields})

    def pack(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state as named tensors and text fields, what a file of it holds.

        Raises:
            LatticeRangeError, NonFiniteError: the run has gone wrong before this moment.
        """
        if self.status is not None:
            ops.check_status(self.status)
        fields = {
            "program": self.program,
            "inverse": self.inverse or "",
            "position": str(self.position),
            "output": str(self.output),
            "frac_bits": "" if self.frac_bits is None else str(self.frac_bits),
            "scales": " ".join("-" if s is None else float(s).hex() for s in self.scales),
        }
        return self._tensors(), fields

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> State:
        """Read a state written by `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is corrupt or is not such a state.
        """
        tensors, fields = read_tensors(path, device)
        if fields.get("format") != _FORMAT:
            raise ValueError(
                f"{os.fspath(path)} is not an inpo_fast state: format must be {_FORMAT!r}, got "
                f"{fields.get('format')!r}"
            )
        return cls.unpack(tensors, fields, os.fspath(path))

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], fields: dict[str, str], path: str) -> State:
        """The state of what `pack` returned; `path` is named in errors.

        Raises:
            ValueError: the fields are damaged or do not agree with the tensors.
        """
        try:
            first, second = (
                None if s == "-" else float.fromhex(s) for s in fields["scales"].split()
            )
            state = cls(
                tracks=(tensors.get("track0"), tensors.get("track1")),
                buffers=(tensors.get("buffer0"), tensors.get("buffer1")),
                scales=(first, second),
                output=int(fields["output"]),
                position=int(fields["position"]),
                frac_bits=int(fields["frac_bits"]) if fields["frac_bits"] else None,
                program=fields["program"],
                inverse=fields["inverse"] or None,
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} has a damaged header: {error!r}") from None
        state._check_loaded(path)
        return state

    def _check_loaded(self, path: str) -> None:
        held = [t for t in self.tracks if t is not None]
        expected = [s is not None for s in self.scales]
        if (
            expected != [t is not None for t in self.tracks]
            or self.output not in (0, 1)
            or not held
        ):
            raise ValueError(f"{path} lacks a track that its header names")
        integer = self.frac_bits is not None
        dtypes = [torch.int32] if integer else list(FLOAT_STATES.values())
        tensors = held + [b for b in self.buffers if b is not None]
        if held[0].dtype not in dtypes or len({t.dtype for t in held}) > 1:
            raise ValueError(
                f"{path} holds tracks of dtype {held[0].dtype}, expected one of {dtypes}"
            )
        if self.position < 0 or not all(s is None or math.isfinite(s) for s in self.scales):
            raise ValueError(
                f"{path} has a damaged header: position {self.position}, scales {self.scales}"
            )
        if len({t.shape for t in tensors}) > 1:
            raise ValueError(f"{path} holds tracks of different shapes")
        if any(b.dtype != torch.int64 or (b < 0).any() for b in self.buffers if b is not None):
            raise ValueError(f"{path} holds a buffer that is not int64 and at least 0")
