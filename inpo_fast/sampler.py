"""Run a program with a model, in floating point or exact to the bit on the lattice."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from . import ops
from .determinism import reproducible
from .lattice import DEFAULT_FRAC_BITS, MAX_BUFFER, lattice_range
from .loop import EagerLoop, GraphLoop, Kind, Model, Stepper, Tables
from .solvers.program import Ends, Program, Update, is_unguided, unwarned
from .state import FLOAT_STATES, State, StateKind

__all__ = ["Callback", "Model", "Sampler", "State", "StateKind"]

Callback: TypeAlias = Callable[[int, Update, State], object]
"""callback(index, update, state) after every update; the state is the run's own until the callback
returns, which may save it or raise to stop."""


class Sampler:
    """Runs a program with a model on a batch.

    The model is called once per stage of an update. With guidance it is called on the batch twice
    over, [2B, …]: first the unconditional half, then the conditional one; with guidance 1 on [B, …]
    alone. Conditioning is the caller's: bind it into `model`. Nothing in the loop waits for the
    device; range and NaN checks are read once at the end. The caller's tensors are not changed.

    Exact to the bit means `state="lattice"`: running a program and then its inverse gives the
    starting bits, provided that the model returns the same bits for the same input (same batch,
    device, library versions). For the time of a run, cuDNN takes its deterministic algorithms and
    neither it nor Inductor chooses kernels by benchmarking, so that a compiled model too gives the
    same bits in another process.

    Compiled on a GPU, each kind of update is one CUDA graph, captured in the first run; later
    updates and runs replay it. The graphs are bound to the shape of the first batch and to the
    memory of what `model` has captured, so new conditioning needs a new sampler (which compiles
    nothing again if `model` is the same function), and Python code in `model` runs only while it is
    captured.

    Threads may share a sampler. A compiled one, whose graphs have one memory, runs for one of them
    at a time while the others wait; its callback and its model cannot run it, nor wait for a thread
    that does.

    Args:
        model: see `Model`; the output has the shape of its input and a floating dtype (up to
            float32 on the lattice).
        program: from `inpo_fast.solvers`, or its `inverse()`.
        guidance_scale: w, or [B] with one per sample.
        state: `lattice`, or the dtype of floating tracks.
        model_dtype: dtype of the sample that the model is given.
        frac_bits: K, lattice resolution 2^−K and range ±2^(31−K).
        impl: backend of the operators, see `inpo_fast.ops`.
        compile: True compiles the model (`fullgraph`) and, on a GPU, captures CUDA graphs; "graph"
            only captures, for a model that needs no compiler (`fuse_layers(unet)`, about as fast,
            ready in seconds) or of which the caller has compiled what is worth it, such as
            `unet.compile_repeated_blocks(fullgraph=True)`.

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
        compile: bool | Literal["graph"] = False,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__name__}")
        if not isinstance(program, Program):
            raise TypeError(f"program must be a Program, got {type(program).__name__}")
        if state != "lattice" and state not in FLOAT_STATES:
            raise ValueError(
                f"state must be 'lattice' or one of {list(FLOAT_STATES)}, got {state!r}"
            )
        if model_dtype not in FLOAT_STATES.values():
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
        if not (isinstance(compile, bool) or compile == "graph"):
            raise ValueError(f"compile must be False, True or 'graph', got {compile!r}")
        self.model = model
        self.program = program
        self.guidance_scale = guidance_scale
        self.state = state
        self.model_dtype = model_dtype
        self.frac_bits = frac_bits if state == "lattice" else None
        self.impl = impl
        self.compile = compile
        self._coefficients = torch.from_numpy(
            program.coefficients(guidance_scale)
        )  # [R, 4] or [R, B, 4]
        self._kinds = [Kind.of(update) for update in program.updates]
        self._stepper = Stepper(
            torch.compile(model, fullgraph=True, dynamic=False) if compile is True else model,
            copies=1 if is_unguided(guidance_scale) else 2,
            model_dtype=model_dtype,
            wide=self._wide,
            frac_bits=self.frac_bits,
            impl=impl,
        )
        self._graphs: GraphLoop | None = None
        self._turn = _Turn()
        # the amplification of the inverse concerns only those who run it
        with unwarned():
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
            track = (sample.double() / scale).to(FLOAT_STATES[self.state])
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
        if self.frac_bits is None and held.dtype != FLOAT_STATES[self.state]:
            raise ValueError(f"the state is {held.dtype}, the sampler's is {self.state}")
        continues = state.program == program.fingerprint and state.position < len(program.updates)
        if not continues and state.inverse != program.fingerprint:
            raise ValueError(
                f"the state belongs to another program: it was left by {state.program[:12]} at "
                f"update {state.position}; "
                f"{program.name} is {program.fingerprint[:12]} with {len(program.updates)} updates"
            )
        if self._scaled and any(
            scale is not None and buffer is None
            for scale, buffer in zip(state.scales, state.buffers, strict=True)
        ):
            raise ValueError(f"the state lacks the information buffers that {program.name} needs")
        if continues:
            return state
        return self._state(state.tracks, state.buffers, program.start, program.input, 0)

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
            RuntimeError: a compiled sampler that is run by its own callback or model.
        """
        with self._turn if self.compile else contextlib.nullcontext():
            return self._run(initial, callback, progress)

    def _run(self, initial: Tensor | State, callback: Callback | None, progress: bool) -> State:
        from tqdm.auto import tqdm

        state = self._resume(initial) if isinstance(initial, State) else self.start(initial)
        sample = state.tracks[state.output]
        assert sample is not None
        if self._coefficients.ndim == 3 and self._coefficients.shape[1] != sample.shape[0]:
            raise ValueError(
                f"guidance_scale has {self._coefficients.shape[1]} values for a batch of "
                f"{sample.shape[0]}"
            )
        held = list(state.scales)
        updates = self.program.updates
        calls = sum(len(u.stages) for u in updates[state.position :])
        with (
            reproducible(),
            tqdm(total=calls, desc=self.program.name, disable=not progress) as bar,
        ):
            loop = self._loop(state, sample)
            try:
                for index in range(state.position, len(updates)):
                    update = updates[index]
                    loop.step(index, self._kinds[index])
                    held[update.track] = update.scale
                    bar.update(len(update.stages))
                    if callback is not None:
                        now = (held[0], held[1])
                        current = self._state(
                            loop.tracks, loop.buffers, now, update.track, index + 1, loop.status
                        )
                        callback(index, update, current)
            except BaseException:
                # a capture that was cut short, or memory that another try needs
                self._graphs = None
                raise
        ops.check_status(loop.status, self._describe)
        final = self._state(
            loop.tracks, loop.buffers, self.program.end, self.program.output, len(updates)
        )
        if isinstance(loop, EagerLoop):
            return final
        final = final.clone()
        loop.end()
        return final

    def _loop(self, state: State, sample: Tensor) -> EagerLoop | GraphLoop:
        """A loop that stands at the state, which it leaves alone."""
        tracks = [torch.zeros_like(sample) if t is None else t.clone() for t in state.tracks]
        buffers: list[Tensor | None] = [None, None]
        if self._scaled:
            buffers = [
                torch.zeros_like(sample, dtype=torch.int64) if b is None else b.clone()
                for b in state.buffers
            ]
        if self.compile == "graph" and not sample.is_cuda:
            raise ValueError(
                f"compile='graph' captures CUDA graphs and needs a GPU, got {sample.device}"
            )
        if self._graphs is not None:
            bound = self._graphs.tracks[0]
            if (bound.shape, bound.device) != (sample.shape, sample.device):
                raise ValueError(
                    f"a compiled sampler is bound to its first batch, {tuple(bound.shape)} on "
                    f"{bound.device}, got {tuple(sample.shape)} on {sample.device}; make another"
                )
        if not (self.compile and sample.is_cuda):
            status = ops.new_status(len(self._kinds), sample.device)  # [U, 1]
            return EagerLoop(self._stepper, self._tables(sample.device), status, tracks, buffers)
        if self._graphs is None:
            self._graphs = GraphLoop(
                self._stepper, self._tables(sample.device), tracks, self._scaled
            )
        self._graphs.begin(tracks, buffers, state.position)
        return self._graphs

    def _tables(self, device: torch.device) -> Tables:
        dtype = torch.float64 if self._wide else torch.float32
        return Tables.of(self.program, self._coefficients, dtype, device)

    def _state(
        self,
        tracks: Sequence[Tensor | None],
        buffers: Sequence[Tensor | None],
        scales: Ends,
        output: int,
        position: int,
        status: Tensor | None = None,
    ) -> State:
        first, second = (scale is not None for scale in scales)
        return State(
            tracks=(tracks[0] if first else None, tracks[1] if second else None),
            buffers=(buffers[0] if first else None, buffers[1] if second else None),
            scales=scales,
            output=output,
            position=position,
            frac_bits=self.frac_bits,
            program=self.program.fingerprint,
            inverse=self._inverse if position == len(self.program.updates) else None,
            status=status,
        )

    def _describe(self, index: int) -> str:
        update = self.program.updates[index]
        where = "" if update.node is None else f" (timestep {update.timestep:g})"
        return (
            f"update {index} of {len(self.program.updates)}{where} of {self.program.name}, "
            f"amplification {self.program.amplification:.3g}"
        )


class _Turn:
    """Held while a compiled run lasts, whose graphs have one memory: other threads wait.

    A copy of a sampler, or one sent to another process, makes its own graphs and has its own turn.
    """

    def __init__(self) -> None:
        self._lock, self._busy = threading.RLock(), False

    def __reduce__(self) -> tuple[type[_Turn], tuple[()]]:
        return _Turn, ()

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._busy:
            self._lock.release()
            raise RuntimeError(
                "a compiled sampler cannot be run by its own callback or model: make another"
            )
        self._busy = True

    def __exit__(self, *_: object) -> None:
        self._busy = False
        self._lock.release()
