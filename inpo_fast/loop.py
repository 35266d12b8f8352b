"""One update after the other: eagerly, or as CUDA graphs that read their constants by a counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import ops
from .graph import capture
from .lattice import ratio_row
from .solvers.program import Program, Update
from .state import FLOAT_STATES, Pair

Model: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""model(sample [G·B, …], timestep [G·B]) → raw output [G·B, …], any prediction type."""


class Kind(NamedTuple):
    """What is fixed about an update: updates of one kind run the same operations."""

    track: int
    inverse: bool
    starts: bool
    scaled: bool  # on the lattice: a multiplies by a fraction other than 0 and 1
    calls: bool
    unit: bool  # the model is called on the other track as it is
    sources: tuple[tuple[int, ...], ...]  # of the later stages, see `Update.sources`
    recalls: bool  # what the track held is read before it is forgotten

    @classmethod
    def of(cls, update: Update) -> Kind:
        return cls(
            update.track,
            update.inverse,
            update.starts,
            update.a not in (0, 1),
            update.node is not None,
            update.model_scale == 1,
            update.sources,
            update.recall is not None,
        )


class Row(NamedTuple):
    """What changes from update to update, on the device."""

    coef: Tensor  # [R, 4] or [R, B, 4], see `Update.rows`
    ratio: Tensor  # [4]
    scale: Tensor  # [2] of the first stage's point, and 1
    timestep: Tensor  # [S] of the stages


class Tables(NamedTuple):
    """The rows of all updates, filled up to the longest."""

    coef: Tensor  # [U, R, 4] or [U, R, B, 4]
    ratio: Tensor  # [U, 4]
    scale: Tensor  # [U, 2]
    timestep: Tensor  # [U, S]

    @classmethod
    def of(
        cls, program: Program, coefficients: Tensor, dtype: torch.dtype, device: torch.device
    ) -> Tables:
        """Bring a program to the device.

        Args:
            program: U updates.
            coefficients: float64 `Program.coefficients`, the rows of all updates in a list.
            dtype: of the coefficients on the device.
            device: where the tracks are.
        """
        updates = program.updates
        pad = torch.nn.utils.rnn.pad_sequence
        rows = coefficients.split([len(u.rows) for u in updates])
        coef = pad(list(rows), batch_first=True) if updates else coefficients[None][:0]
        # a = 0 starts a track that is set to zero, so the lattice adds with n/d = 1
        terms = [u.a.as_integer_ratio() if u.a else (1, 1) for u in updates]
        ratio = torch.tensor([ratio_row(n, d).tolist() for n, d in terms])  # [U, 4]
        scale = torch.tensor([(u.model_scale, 1.0) for u in updates], dtype=torch.float64)
        # the dtype follows the table, not the values, so that it is the same in every program on it
        discrete = all(isinstance(stage.timestep, int) for u in updates for stage in u.stages)
        times = [
            torch.tensor([stage.timestep for stage in u.stages], dtype=torch.float64)
            for u in updates
        ]
        timestep = pad(times, batch_first=True) if times else torch.zeros(0, 0)
        return cls(
            coef.to(device, dtype),
            ratio.to(device),
            scale.to(device),
            timestep.to(device, torch.int64 if discrete else torch.float32),
        )

    def rows(self) -> list[Row]:
        """Views, one row for each update."""
        return [Row(*row) for row in zip(*(table.unbind() for table in self), strict=True)]

    def select(self, counter: Tensor) -> Row:
        """Copies of the row that the counter, int64 [1] on the device, points to."""
        return Row(*(table.index_select(0, counter)[0] for table in self))


@dataclass(frozen=True)
class Stepper:
    """Does one update.

    Attributes:
        model: see `Model`.
        copies: 2 with guidance, where the model is called on the batch twice over, else 1.
        model_dtype: of the sample that the model is given.
        wide: whether the tracks are float64.
        frac_bits: of the lattice, None for floating tracks.
        impl: backend of the operators.
    """

    model: Model
    copies: int
    model_dtype: torch.dtype
    wide: bool
    frac_bits: int | None
    impl: ops.Impl

    def apply(
        self,
        kind: Kind,
        row: Row,
        status: Tensor,
        tracks: list[Tensor],
        buffers: list[Tensor | None],
    ) -> None:
        """Call the model on the other track, [B, …], and update the kind's track in place."""
        x, y, buffer = tracks[kind.track], tracks[1 - kind.track], buffers[kind.track]
        former = x.clone() if kind.recalls else None
        pieces = [(y, *pair) for pair in self._evaluate(kind, row, y, former)]
        if former is not None:
            pieces.append((former, None, None))
        if kind.starts:
            x.zero_()
            if buffer is not None:
                buffer.zero_()
        numbered = list(enumerate(pieces))
        for k, (other, m1, m2) in reversed(numbered) if kind.inverse else numbered:
            options: dict[str, Any] = {"status": status, "impl": self.impl}
            if self.frac_bits is None:
                affine = ops.affine_inverse_ if kind.inverse else ops.affine_update_
                affine(x, other, row.coef[k], m1, m2, **options)
                continue
            options["frac_bits"] = self.frac_bits
            # only the first operator call scales
            if buffer is None or not kind.scaled or k > 0:
                plain = ops.lattice_inverse_ if kind.inverse else ops.lattice_update_
                plain(x, other, row.coef[k], m1, m2, **options)
            else:
                scaled = ops.lattice_scaled_inverse_ if kind.inverse else ops.lattice_scaled_update_
                scaled(x, buffer, other, row.coef[k], row.ratio, m1, m2, **options)

    def _evaluate(self, kind: Kind, row: Row, y: Tensor, former: Tensor | None) -> list[Pair]:
        """The raw model outputs of the stages on track y (and what the other one held before); one
        pair of nothing where there is no call."""
        if not kind.calls:
            return [(None, None)]
        if former is None and not kind.sources:
            return [self._call(self._scaled_point(kind, row, y), row.timestep[0])]
        real = self._real(row, y)
        # the rows of points come after those of the update
        points = iter(row.coef[1 + len(kind.sources) + kind.recalls :])
        if former is None:
            sample = self._scaled_point(kind, row, y)
        else:
            own = self._real(row, former)
            sample = self._repeated(ops.affine_update(own, real, next(points), impl=self.impl))
        outputs = [self._call(sample, row.timestep[0])]
        for k, sources in enumerate(kind.sources, start=1):
            # a compiled model may give its next output the memory of this one
            m1, m2 = outputs[-1]
            outputs[-1] = (m1 if m1 is None else m1.clone(), m2 if m2 is None else m2.clone())
            point = real
            for source in sources:
                point = ops.affine_update(
                    point, real, next(points), *outputs[source], impl=self.impl
                )
            outputs.append(self._call(self._repeated(point), row.timestep[k]))
        return outputs

    def _real(self, row: Row, y: Tensor) -> Tensor:
        """Track y, [B, …], in the precision in which points are computed: float64 for float64
        states, else float32."""
        if self.frac_bits is None:
            return y if self.wide else y.to(torch.float32)
        return ops.lattice_decode(
            y, row.scale[1], torch.float32, frac_bits=self.frac_bits, impl=self.impl
        )

    def _repeated(self, point: Tensor) -> Tensor:
        """A point, [B, …], as the model sees it, [G·B, …]."""
        return torch.cat([point.to(self.model_dtype)] * self.copies)

    def _scaled_point(self, kind: Kind, row: Row, y: Tensor) -> Tensor:
        """What the model sees of the scaled track y, [G·B, …]."""
        if self.frac_bits is None:
            # a 0-d scale would not lift float32 to float64
            return self._repeated(y if kind.unit else y * row.scale[:1])
        return ops.lattice_decode(
            y,
            row.scale[0],
            self.model_dtype,
            frac_bits=self.frac_bits,
            copies=self.copies,
            impl=self.impl,
        )

    def _call(self, sample: Tensor, timestep: Tensor) -> Pair:
        """The raw model outputs at a point, [G·B, …], each [B, …]: (output, None) or
        (unconditional, conditional)."""
        output = self.model(sample, timestep.expand(len(sample)))
        if not isinstance(output, Tensor):
            raise TypeError(f"model must return a tensor, got {type(output).__name__}")
        if output.shape != sample.shape:
            raise ValueError(
                f"model must return a tensor of shape {tuple(sample.shape)}, "
                f"got {tuple(output.shape)}"
            )
        allowed = [d for d in FLOAT_STATES.values() if d != torch.float64 or self.wide]
        if output.dtype not in allowed:
            raise TypeError(f"model must return one of {allowed}, got {output.dtype}")
        if self.copies == 1:
            return output, None
        unconditional, conditional = output.tensor_split(2)
        return unconditional, conditional


Tracks: TypeAlias = "list[Tensor]"
Buffers: TypeAlias = "list[Tensor | None]"


class EagerLoop:
    """Runs updates as they come, on tracks and buffers that it takes over."""

    def __init__(
        self, stepper: Stepper, tables: Tables, status: Tensor, tracks: Tracks, buffers: Buffers
    ) -> None:
        self.tracks, self.buffers, self.status = tracks, buffers, status
        self._stepper = stepper
        self._rows = tables.rows()
        self._words = status.unbind()  # [1] each

    def step(self, index: int, kind: Kind) -> None:
        """Run update `index`."""
        self._stepper.apply(kind, self._rows[index], self._words[index], self.tracks, self.buffers)


class GraphLoop:
    """Runs each kind of update as one CUDA graph, captured when it first comes.

    A graph reads the row of its update at a counter on the device, which it then advances, so that
    a run is a row of replays with nothing for the host to do in between. It is bound to the memory
    of its tracks, and to whatever tensors the model has captured.
    """

    def __init__(
        self, stepper: Stepper, tables: Tables, tracks: Sequence[Tensor], scaled: bool
    ) -> None:
        first = tracks[0]
        self.tracks: Tracks = [torch.empty_like(t) for t in tracks]
        self.buffers: Buffers = [
            torch.empty_like(t, dtype=torch.int64) if scaled else None for t in tracks
        ]
        self.status = ops.new_status(len(tables.ratio), first.device)  # [U, 1]
        self._stepper, self._tables = stepper, tables
        self._counter = torch.zeros(1, dtype=torch.int64, device=first.device)
        self._graphs: dict[Kind, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(first.device)
        self._read = torch.cuda.Event()

    def begin(self, tracks: Tracks, buffers: Buffers, position: int) -> None:
        """Copy a state in, after what reads the last run's: the next update is `position`."""
        self._read.wait(torch.cuda.current_stream(self._stream.device))
        for mine, given in zip((*self.tracks, *self.buffers), (*tracks, *buffers), strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self.status.zero_()
        self._counter.fill_(position)

    def step(self, index: int, kind: Kind) -> None:
        """Run update `index`."""
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(kind)
        self._graphs[kind].replay()

    def end(self) -> None:
        """The tracks have been read: the next run waits for that, whatever stream it is on."""
        self._read.record(torch.cuda.current_stream(self._stream.device))

    def _update(self, kind: Kind, tracks: Tracks, buffers: Buffers) -> None:
        row = self._tables.select(self._counter)
        word = self.status.index_select(0, self._counter)[0]  # [1]
        self._stepper.apply(kind, row, word, tracks, buffers)
        self.status.index_copy_(0, self._counter, word[None])

    def _capture(self, kind: Kind) -> torch.cuda.CUDAGraph:
        def body() -> None:
            self._update(kind, self.tracks, self.buffers)
            self._counter.add_(1)

        def warm_up() -> None:
            # on copies
            status = self.status.clone()
            tracks = [t.clone() for t in self.tracks]
            self._update(kind, tracks, [None if b is None else b.clone() for b in self.buffers])
            self.status.copy_(status)

        graph, _ = capture(body, warm_up, pool=self._pool, stream=self._stream)
        return graph
