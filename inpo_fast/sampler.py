"""Run a program with a model, in floating point or exact to the bit on the lattice."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from . import ops
from .lattice import DEFAULT_FRAC_BITS, MAX_BUFFER, lattice_range, ratio_row
from .solvers.program import (
    AmplificationWarning,
    Ends,
    Program,
    Update,
    is_unguided,
)

Model: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""model(sample [G·B, …], timestep [G·B]) → raw output [G·B, …], any prediction type."""

Pair: TypeAlias = "tuple[Tensor | None, Tensor | None]"

_FORMAT = "inpo_fast.state/1"
_FLOAT_STATES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
StateKind = Literal["lattice", "float64", "float32", "float16", "bfloat16"]


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
            LatticeRangeError, NonFiniteError: the run has gone wrong before this moment.
        """
        from safetensors.torch import save_file

        if self.status is not None:
            ops.check_status(self.status)
        path = Path(path)
        fields = {
            "format": _FORMAT,
            "program": self.program,
            "inverse": self.inverse or "",
            "position": str(self.position),
            "output": str(self.output),
            "frac_bits": "" if self.frac_bits is None else str(self.frac_bits),
            "scales": " ".join("-" if s is None else float(s).hex() for s in self.scales),
        }
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            tensors = {name: t.contiguous() for name, t in self._tensors().items()}
            save_file(tensors, temporary, metadata=fields)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> State:
        """Read a state written by `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is corrupt or is not such a state.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"no state file at {os.fspath(path)}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                fields = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{os.fspath(path)} is not a readable safetensors file: {error}"
            ) from None
        if fields.get("format") != _FORMAT:
            raise ValueError(
                f"{os.fspath(path)} is not an inpo_fast state: format must be {_FORMAT!r}, got "
                f"{fields.get('format')!r}"
            )
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
            raise ValueError(f"{os.fspath(path)} has a damaged header: {error!r}") from None
        state._check_loaded(os.fspath(path))
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
        dtypes = [torch.int32] if integer else list(_FLOAT_STATES.values())
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


class _Kind(NamedTuple):
    """What is fixed about an update: updates of one kind run the same operations."""

    track: int
    inverse: bool
    starts: bool
    scaled: bool  # on the lattice: a multiplies by a fraction other than 0 and 1
    calls: bool
    unit: bool  # the model is called on the other track as it is
    sources: tuple[tuple[int, ...], ...]  # of the later stages, see `Update.sources`

    @classmethod
    def of(cls, update: Update) -> _Kind:
        return cls(
            update.track,
            update.inverse,
            update.starts,
            update.a not in (0, 1),
            update.node is not None,
            update.model_scale == 1,
            update.sources,
        )


class _Row(NamedTuple):
    """What changes from update to update: views of tables on the device."""

    coef: Tensor  # [R, 4] or [R, B, 4], see `Update.rows`
    status: Tensor  # [1]
    ratio: Tensor  # [4]
    scale: Tensor  # [2] of the first stage's point, and 1
    timestep: Tensor  # [S] of the stages


Callback: TypeAlias = Callable[[int, Update, State], object]
"""callback(index, update, state) after every update; the state is the run's own until the callback
returns, which may
save it or raise to stop."""


class Sampler:
    """Runs a program with a model on a batch.

    The model is called once per stage of an update. With guidance it is called on the batch twice
    over, [2B, …]: first the unconditional half, then the conditional one; with guidance 1 on [B, …]
    alone. Conditioning is the caller's: bind it into `model`. Nothing in the loop waits for the
    device; range and NaN checks are read once at the end. The caller's tensors are not changed.

    Exact to the bit means `state="lattice"`: running a program and then its inverse gives the
    starting bits, provided that the model returns the same bits for the same input (same batch,
    device, library versions). The loop runs with cuDNN's deterministic algorithms and without its
    benchmark mode, and restores both settings.

    Args:
        model: see `Model`; the output has the shape of its input and a floating dtype (up to
            float32 on the lattice).
        program: from `inpo_fast.solvers`, or its `inverse()`.
        guidance_scale: w, or [B] with one per sample.
        state: `lattice`, or the dtype of floating tracks.
        model_dtype: dtype of the sample that the model is given.
        frac_bits: K, lattice resolution 2^−K and range ±2^(31−K).
        impl: backend of the operators, see `inpo_fast.ops`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        model: Model,
        program: Program,
        *,
        guidance_scale: float | Sequence[float] = 1.0,
        state: StateKind = "lattice",
        model_dtype: torch.dtype = torch.float32,
        frac_bits: int = DEFAULT_FRAC_BITS,
        impl: ops.Impl = "auto",
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__name__}")
        if not isinstance(program, Program):
            raise TypeError(f"program must be a Program, got {type(program).__name__}")
        if state != "lattice" and state not in _FLOAT_STATES:
            raise ValueError(
                f"state must be 'lattice' or one of {list(_FLOAT_STATES)}, got {state!r}"
            )
        if model_dtype not in _FLOAT_STATES.values():
            raise ValueError(f"model_dtype must be a floating dtype, got {model_dtype}")
        if state == "lattice":
            lattice_range(frac_bits)
            if model_dtype == torch.float64:
                raise ValueError(
                    "the lattice takes model outputs up to float32, got model_dtype float64"
                )
            if program.max_buffer > MAX_BUFFER:
                raise ValueError(
                    f"{program.name} over {program.model_calls} model calls needs an information "
                    f"buffer of {program.max_buffer.bit_length()} bits and the lattice has "
                    f"{MAX_BUFFER.bit_length() - 1}; "
                    "use fewer steps or a multiplier nearer to 1"
                )
        if impl not in get_args(ops.Impl):
            raise ValueError(f"impl must be one of {get_args(ops.Impl)}, got {impl!r}")
        self.model = model
        self.program = program
        self.guidance_scale = guidance_scale
        self.state = state
        self.model_dtype = model_dtype
        self.frac_bits = frac_bits if state == "lattice" else None
        self.impl = impl
        self._coefficients = torch.from_numpy(
            program.coefficients(guidance_scale)
        )  # [U, 4] or [U, B, 4]
        self._copies = 1 if is_unguided(guidance_scale) else 2
        with warnings.catch_warnings():
            # the amplification of the inverse concerns only those who run it
            warnings.simplefilter("ignore", AmplificationWarning)
            self._inverse = program.inverse().fingerprint if program.reversible else None

    @torch.no_grad()
    def start(self, sample: Tensor) -> State:
        """The state before the first update: `sample` [B, …] on the program's input track.

        Raises:
            ValueError: the program starts from two tracks, so it needs a `State`; or a sample
                outside the lattice.
        """
        program = self.program
        if not isinstance(sample, Tensor) or not sample.is_floating_point():
            raise TypeError(
                f"sample must be a floating tensor, got {getattr(sample, 'dtype', type(sample))}"
            )
        if sample.ndim < 1:
            raise ValueError("sample must be [B, …], got a tensor without dimensions")
        if program.start[1 - program.input] is not None:
            raise ValueError(
                f"{program.name} starts from both tracks: run it on a State, not on a tensor"
            )
        scale = program.start[program.input]
        assert scale is not None
        # one layout, whatever the caller's: a saved state has it too, and the model's bits may
        # depend on it
        sample = sample.contiguous()
        if self.frac_bits is None:
            track = (sample.double() / scale).to(_FLOAT_STATES[self.state])
        else:
            unit = torch.tensor(1 / scale, dtype=torch.float64, device=sample.device)
            status = ops.new_status(1, sample.device)  # [1, 1]
            track = ops.lattice_encode(
                sample, unit, frac_bits=self.frac_bits, status=status[0], impl=self.impl
            )
            ops.check_status(status, lambda _: "encoding the sample")
        buffer = torch.zeros_like(track, dtype=torch.int64) if self._scaled else None
        return self._state([track] * 2, [buffer] * 2, program.start, program.input, 0)

    @property
    def _wide(self) -> bool:
        return self.state == "float64"

    @property
    def _scaled(self) -> bool:
        return self.frac_bits is not None and self.program.scales

    def _resume(self, state: State) -> State:
        """`state` as the start of this program: an unfinished run of it, or the end of the program
        that it undoes."""
        program = self.program
        if state.frac_bits != self.frac_bits:
            raise ValueError(
                f"the state has frac_bits {state.frac_bits}, the sampler {self.frac_bits}"
            )
        if state.status is not None:
            ops.check_status(state.status)
        held = state.tracks[state.output]
        assert held is not None
        if self.frac_bits is None and held.dtype != _FLOAT_STATES[self.state]:
            raise ValueError(f"the state is {held.dtype}, the sampler's is {self.state}")
        if state.program == program.fingerprint and state.position < len(program.updates):
            return state
        if state.inverse == program.fingerprint:
            return self._state(state.tracks, state.buffers, program.start, program.input, 0)
        raise ValueError(
            f"the state belongs to another program: it was left by {state.program[:12]} at update "
            f"{state.position}; "
            f"{program.name} is {program.fingerprint[:12]} with {len(program.updates)} updates"
        )

    def _rows(self, device: torch.device, status: Tensor) -> list[_Row]:
        updates = self.program.updates
        dtype = torch.float64 if self._wide else torch.float32
        coef = self._coefficients.to(device, dtype)  # [R, 4] or [R, B, 4]
        # a = 0 starts a track that is set to zero, so the lattice adds with n/d = 1
        terms = [u.a.as_integer_ratio() if u.a else (1, 1) for u in updates]
        ratio = torch.tensor([ratio_row(n, d).tolist() for n, d in terms], device=device)  # [U, 4]
        scale = torch.tensor(
            [(u.model_scale, 1.0) for u in updates], dtype=torch.float64, device=device
        )  # [U, 2]
        # the dtype follows the table, not the values, so that it is the same in every program on it
        stages = [stage for u in updates for stage in u.stages]
        discrete = all(isinstance(stage.timestep, int) for stage in stages)
        times = torch.tensor([stage.timestep for stage in stages], dtype=torch.float64)  # [S]
        times = times.to(device, torch.int64 if discrete else torch.float32)
        rows = zip(
            coef.split([len(u.rows) for u in updates]),
            status,
            ratio,
            scale,
            times.split([len(u.stages) for u in updates]),
            strict=True,
        )
        return [_Row(*row) for row in rows]

    @torch.no_grad()
    def run(
        self,
        initial: Tensor | State,
        *,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> State:
        """Run the program to its end.

        Args:
            initial: [B, …] the sample at the program's start, or the state of an earlier run: of
                this program, to continue it, or of the program that this one undoes.
            callback: see `Callback`.
            progress: show a progress bar over the model calls.

        Returns:
            The state after the last update.

        Raises:
            LatticeRangeError: a track left the lattice; names the step and the amplification.
            NonFiniteError: NaN or infinity from the model; names the step.
            ValueError: shapes, dtypes or programs that do not agree.
        """
        from tqdm.auto import tqdm

        state = self._resume(initial) if isinstance(initial, State) else self.start(initial)
        sample = state.tracks[state.output]
        assert sample is not None
        if self._coefficients.ndim == 3 and self._coefficients.shape[1] != sample.shape[0]:
            raise ValueError(
                f"guidance_scale has {self._coefficients.shape[1]} values for a batch of "
                f"{sample.shape[0]}"
            )
        tracks = [torch.zeros_like(sample) if t is None else t.clone() for t in state.tracks]
        buffers: list[Tensor | None] = [None, None]
        if self._scaled:
            buffers = [
                torch.zeros_like(sample, dtype=torch.int64) if b is None else b.clone()
                for b in state.buffers
            ]
        held = list(state.scales)
        updates = self.program.updates
        status = ops.new_status(len(updates), sample.device)  # [U, 1]
        rows = self._rows(sample.device, status)
        calls = sum(len(u.stages) for u in updates[state.position :])
        with (
            _reproducible(),
            tqdm(total=calls, desc=self.program.name, disable=not progress) as bar,
        ):
            for index in range(state.position, len(updates)):
                update = updates[index]
                self._apply(_Kind.of(update), rows[index], tracks, buffers)
                held[update.track] = update.scale
                bar.update(len(update.stages))
                if callback is not None:
                    current = self._state(
                        tracks, buffers, (held[0], held[1]), update.track, index + 1, status
                    )
                    callback(index, update, current)
        ops.check_status(status, self._describe)
        return self._state(tracks, buffers, self.program.end, self.program.output, len(updates))

    def _state(
        self,
        tracks: Sequence[Tensor | None],
        buffers: Sequence[Tensor | None],
        scales: Ends,
        output: int,
        position: int,
        status: Tensor | None = None,
    ) -> State:
        kept = [scale is not None for scale in scales]
        return State(
            tracks=(tracks[0] if kept[0] else None, tracks[1] if kept[1] else None),
            buffers=(buffers[0] if kept[0] else None, buffers[1] if kept[1] else None),
            scales=scales,
            output=output,
            position=position,
            frac_bits=self.frac_bits,
            program=self.program.fingerprint,
            inverse=self._inverse if position == len(self.program.updates) else None,
            status=status,
        )

    def _apply(
        self, kind: _Kind, row: _Row, tracks: list[Tensor], buffers: list[Tensor | None]
    ) -> None:
        """Call the model on the other track, [B, …], and update the kind's track in place."""
        x, y, buffer = tracks[kind.track], tracks[1 - kind.track], buffers[kind.track]
        outputs = self._evaluate(kind, row, y)
        if kind.starts:
            x.zero_()
            if buffer is not None:
                buffer.zero_()
        pieces = list(enumerate(outputs))
        for k, (m1, m2) in reversed(pieces) if kind.inverse else pieces:
            options: dict[str, Any] = {"status": row.status, "impl": self.impl}
            if self.frac_bits is None:
                affine = ops.affine_inverse_ if kind.inverse else ops.affine_update_
                affine(x, y, row.coef[k], m1, m2, **options)
                continue
            options["frac_bits"] = self.frac_bits
            # only the first operator call scales
            if buffer is None or not kind.scaled or k > 0:
                plain = ops.lattice_inverse_ if kind.inverse else ops.lattice_update_
                plain(x, y, row.coef[k], m1, m2, **options)
            else:
                scaled = ops.lattice_scaled_inverse_ if kind.inverse else ops.lattice_scaled_update_
                scaled(x, buffer, y, row.coef[k], row.ratio, m1, m2, **options)

    def _evaluate(self, kind: _Kind, row: _Row, y: Tensor) -> list[Pair]:
        """The raw model outputs of the stages on track y; one pair of nothing where there is no
        call."""
        if not kind.calls:
            return [(None, None)]
        outputs = [self._call(self._first_point(kind, row, y), row.timestep[0])]
        if not kind.sources:
            return outputs
        base = self._real(row, y)
        index = len(kind.sources) + 1
        for k, sources in enumerate(kind.sources, start=1):
            # a compiled model may give its next output the memory of this one
            m1, m2 = outputs[-1]
            outputs[-1] = (m1 if m1 is None else m1.clone(), m2 if m2 is None else m2.clone())
            point = base
            for source in sources:
                point = ops.affine_update(
                    point, base, row.coef[index], *outputs[source], impl=self.impl
                )
                index += 1
            sample = torch.cat([point.to(self.model_dtype)] * self._copies)
            outputs.append(self._call(sample, row.timestep[k]))
        return outputs

    def _real(self, row: _Row, y: Tensor) -> Tensor:
        """Track y, [B, …], in the precision in which points are computed: float64 for float64
        states, else float32."""
        if self.frac_bits is None:
            return y if self._wide else y.to(torch.float32)
        return ops.lattice_decode(
            y, row.scale[1], torch.float32, frac_bits=self.frac_bits, impl=self.impl
        )

    def _first_point(self, kind: _Kind, row: _Row, y: Tensor) -> Tensor:
        """What the model sees first, [G·B, …]: the scaled track y, rounded to its dtype."""
        if self.frac_bits is None:
            # a 0-d scale would not lift float32 to float64
            sample = (y if kind.unit else y * row.scale[:1]).to(self.model_dtype)
            return torch.cat([sample] * self._copies)
        return ops.lattice_decode(
            y,
            row.scale[0],
            self.model_dtype,
            frac_bits=self.frac_bits,
            copies=self._copies,
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
        allowed = [d for d in _FLOAT_STATES.values() if d != torch.float64 or self._wide]
        if output.dtype not in allowed:
            raise TypeError(f"model must return one of {allowed}, got {output.dtype}")
        if self._copies == 1:
            return output, None
        unconditional, conditional = output.tensor_split(2)
        return unconditional, conditional

    def _describe(self, index: int) -> str:
        update = self.program.updates[index]
        where = "" if update.node is None else f" (timestep {update.timestep:g})"
        return (
            f"update {index} of {len(self.program.updates)}{where} of {self.program.name}, "
            f"amplification {self.program.amplification:.3g}"
        )


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """cuDNN's deterministic algorithms, chosen without benchmarking, while a program runs."""
    cudnn = torch.backends.cudnn
    # not cudnn.flags(): it would also reset the settings that it is not given, TF32 among them
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
