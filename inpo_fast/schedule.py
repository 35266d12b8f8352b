"""Noise schedules: a grid of noise levels and how a model's output is read on it.

Node i = 0 … N runs from data to noise and a noisy sample at node i is

    z_i = α_i x + σ_i ε.

Every prediction type is affine in (z, m) with m the raw model output, so the two estimates

    x̂ = p z + q m,        ε̂ = r z + s m

need four numbers per node and no solver has to know the type. Solvers work in the coordinate u = z
/ ℓ, in which the probability-flow ODE has no linear part, du/dτ = F (DDIM: Song et al. 2021, eq.
14):

    noise form      ℓ = α        τ = σ/α          F = ε̂          while α > 0
    velocity form   ℓ = α + σ    τ = σ/(α+σ)      F = ε̂ − x̂     rectified flow, and α = 0 (zero SNR)

Both give the same DDIM step; the second stays finite at pure noise. All numbers are float64 on the
host.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Kind = Literal["vp", "ve", "flow"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow", "edm"]
Spacing = Literal["leading", "trailing", "linspace"]


class Point(NamedTuple):
    """One noise level of a schedule: entries of the arrays of `NoiseSchedule`."""

    timestep: float
    alpha: float
    sigma: float
    scale: float
    tau: float
    field_z: float
    field_m: float
    input_scale: float


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A grid of N+1 noise levels from data (node 0) to noise (node N).

    Args:
        timesteps: [N+1] time given to the model at each node, in the model's own unit.
        alpha: [N+1] signal coefficient α.
        sigma: [N+1] noise coefficient σ; σ/α (or σ/(α+σ)) must not decrease, and may be flat only
            between nodes 0 and 1, where a diffusers grid that contains t = 0 ends with a step of no
            length.
        kind: `vp` (α² + σ² = 1), `ve` (α = 1, also EDM) or `flow` (α + σ = 1).
        prediction_type: what the model returns: `epsilon` (ε), `v_prediction` (α ε − σ x, Salimans
            and Ho 2022), `sample` (x), `flow` (velocity ε − x) or `edm` (Karras et al. 2022: the
            raw network F with x̂ = c_skip z + c_out F(c_in z, c_noise)).
        sigma_data: standard deviation of the data; read by `edm` only.
        alphas_cumprod: [T] the table ᾱ_t that the timesteps index, where there is one; read for
            times between the nodes (`point`) only.

    Attributes:
        scale, tau: [N+1] ℓ and τ of the coordinate above.
        field_z, field_m: [N+1] F = field_z z + field_m m.
        input_scale: [N+1] the model is called on `input_scale · z`; 1 except for `edm`.

    Raises:
        ValueError: naming the argument, what must hold and what came.
    """

    timesteps: Array
    alpha: Array
    sigma: Array
    kind: Kind = "vp"
    prediction_type: PredictionType = "epsilon"
    sigma_data: float = 0.5
    alphas_cumprod: Array | None = field(default=None, repr=False)

    scale: Array = field(init=False, repr=False)
    tau: Array = field(init=False, repr=False)
    field_z: Array = field(init=False, repr=False)
    field_m: Array = field(init=False, repr=False)
    input_scale: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"prediction_type must be one of {get_args(PredictionType)}, "
                f"got {self.prediction_type!r}"
            )
        if self.prediction_type == "edm" and self.kind != "ve":
            raise ValueError(
                f"edm prediction is defined for z = x + σ ε, kind 've', got kind {self.kind!r}"
            )
        if not (np.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}")
        for name in ("timesteps", "alpha", "sigma"):
            values = np.array(getattr(self, name), dtype=np.float64)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        alpha, sigma = self.alpha, self.sigma
        if (
            alpha.ndim != 1
            or len(alpha) < 2
            or not alpha.shape == sigma.shape == self.timesteps.shape
        ):
            raise ValueError(
                "timesteps, alpha and sigma must be [N+1] with N >= 1, got shapes "
                f"{self.timesteps.shape}, {alpha.shape} and {sigma.shape}"
            )
        if not (np.isfinite(alpha).all() and np.isfinite(sigma).all()):
            raise ValueError("alpha and sigma must be finite")
        if (alpha < 0).any() or (sigma < 0).any():
            raise ValueError("alpha and sigma must not be negative")
        constraint = {"vp": alpha**2 + sigma**2, "ve": alpha, "flow": alpha + sigma}[self.kind]
        if np.abs(constraint - 1).max() > 1e-12:
            equation = {"vp": "alpha² + sigma²", "ve": "alpha", "flow": "alpha + sigma"}[self.kind]
            raise ValueError(
                f"a {self.kind} schedule needs {equation} = 1 at every node, got {constraint}"
            )

        level = sigma / (alpha + sigma if self.velocity_form else alpha)
        stuck = np.diff(level) <= 0
        stuck[0] = level[1] < level[0]
        if stuck.any():
            node = int(stuck.argmax())
            ratio = "sigma/(alpha + sigma)" if self.velocity_form else "sigma/alpha"
            raise ValueError(
                "noise must grow from node to node (only the first step may be flat), got "
                f"{ratio} = {level[node]} at node {node} (timestep {self.timesteps[node]:g}) and "
                f"{level[node + 1]} at the next (timestep {self.timesteps[node + 1]:g})"
            )
        for name, values in self._derived(alpha, sigma).items():
            values = np.array(values)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        for node in range(1, self.num_steps + 1):
            if not self.callable_at(node):
                raise ValueError(
                    f"{self.prediction_type} prediction is undefined at node {node} "
                    f"(alpha = {alpha[node]}, "
                    f"sigma = {sigma[node]}, timestep = {self.timesteps[node]})"
                )

    def _derived(self, alpha: Array, sigma: Array) -> dict[str, Array]:
        """What follows from α and σ, [K] each."""
        p, q, r, s = self._prediction(alpha, sigma)
        velocity_form = self.velocity_form
        scale = alpha + sigma if velocity_form else alpha
        edm = self.prediction_type == "edm"
        return {
            "scale": scale,
            "tau": sigma / scale,
            "field_z": r - p if velocity_form else r,
            "field_m": s - q if velocity_form else s,
            "input_scale": 1 / np.sqrt(sigma**2 + self.sigma_data**2) if edm else alpha**0,
        }

    def _prediction(self, a: Array, s: Array) -> tuple[Array, Array, Array, Array]:
        """(p, q, r, s), each [K], of x̂ = p z + q m and ε̂ = r z + s m at α = a and σ = s; not
        finite where undefined."""
        zero, one = np.zeros_like(a), np.ones_like(a)
        with np.errstate(divide="ignore", invalid="ignore"):
            match self.prediction_type:
                case "epsilon":
                    return one / a, -s / a, zero, one
                case "sample":
                    return zero, one, one / s, -a / s
                case "v_prediction":
                    norm = a**2 + s**2
                    return a / norm, -s / norm, s / norm, a / norm
                case "flow":
                    norm = a + s
                    return one / norm, -s / norm, one / norm, a / norm
                case "edm":
                    # c_skip and c_out of Karras et al. 2022, table 1, for z = x + σ ε; the
                    # division of (z − x̂) by σ is done on paper so that it holds at σ = 0
                    d = self.sigma_data
                    norm = s**2 + d**2
                    return d**2 / norm, s * d / np.sqrt(norm), s / norm, -d / np.sqrt(norm)

    @cached_property
    def velocity_form(self) -> bool:
        """Whether the coordinate is the velocity form, the one that is finite at α = 0."""
        return self.kind == "flow" or bool(self.alpha.min() == 0)

    @property
    def num_steps(self) -> int:
        """N, the number of steps of the grid."""
        return len(self.alpha) - 1

    @cached_property
    def discrete(self) -> bool:
        """Whether the model's time is an index of a table of timesteps, given to it as integers."""
        return self.kind == "vp" and bool((self.timesteps == np.rint(self.timesteps)).all())

    def callable_at(self, node: int) -> bool:
        """Whether the model's output can be read at `node` (a `sample` model says nothing about ε
        at σ = 0)."""
        values = (self.field_z[node], self.field_m[node], self.timesteps[node])
        return bool(np.isfinite(values).all())

    @cached_property
    def log_snr(self) -> Array:
        """[N+1] λ = ln(α/σ), infinite where α or σ is 0."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.alpha) - np.log(self.sigma))

    def point(self, node: float) -> Point:
        """The noise level at a node, or at i + 1/2 that at the midpoint of the nodes i and i + 1
        in λ.

        The model's time at a midpoint is read from the table of `alphas_cumprod` by λ, linearly
        between its entries, and so is not an integer. Without a table it is linear between the two
        nodes: in σ for `flow`, else in λ, which is exact for `flow` and `edm` and leaves an error
        of second order in the step where a schedule was made by hand.

        Raises:
            ValueError: no such node, or a midpoint beside a node with an infinite λ.
        """
        low = int(node)
        if node == low and 0 <= low <= self.num_steps:
            values = (getattr(self, name)[low] for name in Point._fields[1:])
            return Point(self.timesteps[low], *values)
        if node != low + 0.5 or not 0 <= low < self.num_steps:
            raise ValueError(
                f"node must be in 0 … {self.num_steps} or halfway between two nodes, got {node}"
            )
        if not np.isfinite(self.log_snr[low : low + 2]).all():
            raise ValueError(f"node {node} lies between levels of infinite log(alpha/sigma)")
        return Point(**{name: values[low] for name, values in self._midpoints.items()})

    @cached_property
    def _midpoints(self) -> dict[str, Array]:
        """The fields of `point` at i + 1/2, [N] each, not finite where there is no midpoint."""
        log_snr = self.log_snr
        with np.errstate(invalid="ignore"):
            middle = (log_snr[1:] + log_snr[:-1]) / 2
            ratio = np.exp(-middle)  # σ/α
            match self.kind:
                case "vp":
                    alpha = 1 / np.sqrt(1 + ratio**2)
                case "ve":
                    alpha = np.ones_like(ratio)
                case "flow":
                    alpha = 1 / (1 + ratio)
            sigma = ratio * alpha
            if self.alphas_cumprod is not None:
                bar = self.alphas_cumprod
                inside = (bar > 0) & (bar < 1)
                known = np.log(bar[inside] / (1 - bar[inside])) / 2  # falls with t
                time = np.interp(-middle, -known, np.flatnonzero(inside))
            else:
                axis, at = (self.sigma, sigma) if self.kind == "flow" else (log_snr, middle)
                share = (at - axis[:-1]) / np.diff(axis)
                time = self.timesteps[:-1] + share * np.diff(self.timesteps)
            derived = self._derived(alpha, sigma)
        return {"timestep": time, "alpha": alpha, "sigma": sigma, **derived}

    @property
    def first_callable(self) -> int:
        """The cleanest node at which the model can be called: 0, or 1 where node 0 is undefined."""
        return 0 if self.callable_at(0) else 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the grid and of how the model's output is read on it."""
        head = f"{self.kind} {self.prediction_type} {self.sigma_data.hex()}"
        grid = np.stack([self.timesteps, self.alpha, self.sigma]).astype("<f8")
        return hashlib.sha256(head.encode() + grid.tobytes()).hexdigest()

    def cleanest(self, num_steps: int) -> NoiseSchedule:
        """Nodes 0 … `num_steps` of this grid.

        Raises:
            ValueError: not in 1 … N.
        """
        _require_steps(num_steps)
        if num_steps > self.num_steps:
            raise ValueError(
                f"num_steps must be at most the {self.num_steps} of the grid, got {num_steps}"
            )
        kept = slice(num_steps + 1)
        return replace(
            self,
            timesteps=self.timesteps[kept],
            alpha=self.alpha[kept],
            sigma=self.sigma[kept],
        )

    def fraction(self, strength: float) -> NoiseSchedule:
        """The cleanest `strength` of the steps, rounded, at least one.

        Raises:
            ValueError: not in (0, 1].
        """
        real = isinstance(strength, Real) and not isinstance(strength, bool)
        if not real or not 0 < strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {strength!r}")
        return self.cleanest(max(1, round(self.num_steps * strength)))

    @classmethod
    def from_alphas_cumprod(
        cls,
        alphas_cumprod: ArrayLike,
        num_steps: int | None = None,
        *,
        spacing: Spacing = "leading",
        steps_offset: int = 0,
        timesteps: Sequence[int] | None = None,
        final_alpha_cumprod: float = 1.0,
        prediction_type: PredictionType = "epsilon",
    ) -> NoiseSchedule:
        """Variance-preserving grid on a table of ᾱ_t, with node 0 at `final_alpha_cumprod`.

        Args:
            alphas_cumprod: [T] cumulative products ᾱ_t, t = 0 … T−1 (α = √ᾱ, σ = √(1−ᾱ)).
            num_steps: N; give this or `timesteps`.
            spacing, steps_offset: how N timesteps are laid out, as diffusers does (Lin et al. 2023,
                table 2). Where leading spacing plus its offset would leave the table (N = T), the
                offset is what fits.
            timesteps: explicit timesteps of nodes N … 1, falling, instead of `num_steps`.
            final_alpha_cumprod: ᾱ at node 0: 1 for clean data, ᾱ_0 for `set_alpha_to_one=False`.
            prediction_type: see `NoiseSchedule`.
        """
        table = np.asarray(alphas_cumprod, dtype=np.float64)
        if table.ndim != 1 or not len(table) or not ((table >= 0) & (table <= 1)).all():
            raise ValueError("alphas_cumprod must be [T] with values in [0, 1]")
        if (num_steps is None) == (timesteps is None):
            raise ValueError("give exactly one of num_steps and timesteps")
        if timesteps is None:
            assert num_steps is not None
            grid = spaced_timesteps(len(table), num_steps, spacing, steps_offset)
        else:
            grid = _explicit_timesteps(timesteps, len(table))
        bar = np.concatenate([[final_alpha_cumprod], table[grid]])
        return cls(
            timesteps=np.concatenate([[0], grid]),
            alpha=np.sqrt(bar),
            sigma=np.sqrt(1 - bar),
            kind="vp",
            prediction_type=prediction_type,
            alphas_cumprod=table,
        )

    @classmethod
    def flow(
        cls, num_steps: int, *, shift: float = 1.0, num_train_timesteps: int = 1000
    ) -> NoiseSchedule:
        """Rectified flow z = (1−s) x + s ε with s falling evenly from 1 and shifted, s ← k s / (1 +
        (k−1) s).

        The shift is eq. 23 of Esser et al. 2024; the model's time is s · `num_train_timesteps`.
        """
        _require_steps(num_steps)
        if not 0 < shift < np.inf:
            raise ValueError(f"shift must be positive, got {shift}")
        s = np.linspace(0, 1, num_steps + 1)
        # at s = 1 the quotient k / (1 + (k−1)) may round to more than 1
        sigmas = np.minimum(shift * s / (1 + (shift - 1) * s), 1)
        return cls._from_flow_sigmas(sigmas, num_train_timesteps)

    @classmethod
    def _from_flow_sigmas(cls, sigmas: Array, num_train_timesteps: int) -> NoiseSchedule:
        return cls(
            timesteps=sigmas * num_train_timesteps,
            alpha=1 - sigmas,
            sigma=sigmas,
            kind="flow",
            prediction_type="flow",
        )

    @classmethod
    def _from_flow_scheduler(
        cls, scheduler: Any, num_steps: int | None, sigmas: Sequence[float] | None, mu: float | None
    ) -> NoiseSchedule:
        config = scheduler.config
        if (num_steps is None) == (sigmas is None):
            raise ValueError(
                "a flow-matching schedule needs exactly one of num_inference_steps and sigmas"
            )
        if getattr(config, "use_dynamic_shifting", False) and mu is None:
            raise ValueError("a scheduler with use_dynamic_shifting needs mu")
        for option, reason in (
            ("stochastic_sampling", "its steps add noise and have no inverse"),
            ("invert_sigmas", "its time runs the other way round"),
        ):
            if getattr(config, option, False):
                raise ValueError(f"scheduler must have {option}=False: {reason}")
        if getattr(scheduler, "order", 1) != 1:
            raise ValueError(
                f"scheduler must have one sigma a step, got {type(scheduler).__name__}; make one "
                "with FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)"
            )
        options: dict[str, Any] = {} if mu is None else {"mu": mu}
        if sigmas is None:
            _require_steps(num_steps)
            options["num_inference_steps"] = num_steps
        else:
            options["sigmas"] = _explicit_sigmas(sigmas)
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(device="cpu", **options)
        grid = scheduler.sigmas.double().numpy()[::-1]
        # the scheduler's float32 may round its largest σ to more than 1
        grid = np.where((grid > 1) & (grid < 1 + 2**-20), 1.0, grid)
        return cls._from_flow_sigmas(grid, config.num_train_timesteps)

    @classmethod
    def edm(
        cls,
        num_steps: int,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
    ) -> NoiseSchedule:
        """Grid of Karras et al. 2022, eq. 5, closed by σ = 0, for their preconditioned network.

        The model is called on c_in z at the time c_noise = ln(σ)/4.
        """
        _require_steps(num_steps)
        if not 0 < sigma_min < sigma_max or not rho > 0:
            raise ValueError(
                "need 0 < sigma_min < sigma_max and rho > 0, got "
                f"{sigma_min}, {sigma_max} and {rho}"
            )
        # a single step starts at sigma_max
        ramp = np.linspace(0, 1, num_steps) if num_steps > 1 else np.ones(1)
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        sigma = np.concatenate([[0], (low + ramp * (high - low)) ** rho])
        with np.errstate(divide="ignore"):
            time = np.log(sigma) / 4
        return cls(time, np.ones_like(sigma), sigma, "ve", "edm", sigma_data)

    @classmethod
    def from_diffusers(
        cls,
        scheduler: Any,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> NoiseSchedule:
        """The grid that a diffusers scheduler defines; the scheduler itself is left as it was.

        Schedulers with an `alphas_cumprod` table give a `vp` schedule: the float32 ᾱ is taken as it
        is and all else is derived in float64. Whatever their class, the timesteps are those of a
        `DDIMScheduler` with their `timestep_spacing` and `steps_offset`: multistep schedulers have
        grids of their own (Karras sigmas among them), which are not for a DDIM-type solver.
        Flow-matching schedulers give a `flow` schedule with their own sigmas.

        Args:
            scheduler: e.g. `pipe.scheduler`.
            num_inference_steps: N; give this or `timesteps` (`alphas_cumprod` schedulers only).
            timesteps: explicit timesteps of nodes N … 1, falling.
            sigmas: [N] explicit noise levels before the shift, falling, instead of the two above
                (flow-matching schedulers only; pipelines of Flux give 1 … 1/N).
            mu: dynamic shift for flow-matching schedulers with `use_dynamic_shifting`.

        Raises:
            TypeError: not a scheduler.
            ValueError: a scheduler without such a grid or with `clip_sample` or `thresholding`, or
                arguments that do not belong to it.
        """
        if not hasattr(scheduler, "config"):
            raise TypeError(
                f"scheduler must be a diffusers scheduler, got {type(scheduler).__name__}"
            )
        config = scheduler.config
        if mu is not None and not getattr(config, "use_dynamic_shifting", False):
            raise ValueError(
                f"mu needs a scheduler with use_dynamic_shifting, got {type(scheduler).__name__}"
            )
        if "FlowMatch" in type(scheduler).__name__:
            if timesteps is not None:
                raise ValueError("a flow-matching schedule takes sigmas, not timesteps")
            return cls._from_flow_scheduler(scheduler, num_inference_steps, sigmas, mu)
        if sigmas is not None:
            raise ValueError(
                f"sigmas needs a flow-matching scheduler, got {type(scheduler).__name__}"
            )
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                "scheduler must define alphas_cumprod or be a flow-matching scheduler, got "
                f"{type(scheduler).__name__}; make one with "
                "DDIMScheduler.from_config(pipe.scheduler.config)"
            )
        for option in ("clip_sample", "thresholding"):
            if getattr(config, option, False):
                raise ValueError(
                    f"scheduler must have {option}=False: with it a step is not affine and has no "
                    f"inverse; make one with {type(scheduler).__name__}.from_config("
                    f"scheduler.config, {option}=False)"
                )
        predicts = getattr(config, "prediction_type", None)
        if predicts not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                "scheduler must have the prediction_type that the model was trained with, "
                f"'epsilon', 'v_prediction' or 'sample', got {predicts!r}: make one with "
                "DDIMScheduler.from_config(scheduler.config, prediction_type=...), or for "
                "rectified flow with FlowMatchEulerDiscreteScheduler"
            )
        if getattr(config, "use_flow_sigmas", False):
            raise ValueError(
                "scheduler must have use_flow_sigmas=False: they are not those of its "
                "alphas_cumprod; for rectified flow use FlowMatchEulerDiscreteScheduler"
            )
        table = scheduler.alphas_cumprod.double().cpu().numpy()
        final = getattr(scheduler, "final_alpha_cumprod", None)
        return cls.from_alphas_cumprod(
            table,
            num_inference_steps,
            spacing=getattr(config, "timestep_spacing", "leading"),
            steps_offset=getattr(config, "steps_offset", 0),
            timesteps=timesteps,
            final_alpha_cumprod=1.0 if final is None else float(final),
            prediction_type=predicts,
        )


def scaled_linear_alphas_cumprod(
    beta_start: float = 0.00085, beta_end: float = 0.012, num_train_timesteps: int = 1000
) -> Array:
    """[T] ᾱ of Stable Diffusion's table, √β linear in t, in float64."""
    return np.cumprod(
        1 - np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2, dtype=np.float64
    )


def spaced_timesteps(
    num_train_timesteps: int, num_steps: int, spacing: Spacing, steps_offset: int = 0
) -> NDArray[np.int64]:
    """[N] rising integer timesteps laid out as diffusers does (Lin et al. 2023, table 2)."""
    _require_steps(num_steps)
    if isinstance(steps_offset, bool) or not isinstance(steps_offset, (int, np.integer)):
        raise TypeError(f"steps_offset must be an integer, got {type(steps_offset).__name__}")
    if steps_offset < 0:
        raise ValueError(f"steps_offset must be at least 0, got {steps_offset}")
    total = num_train_timesteps
    if num_steps > total:
        raise ValueError(
            f"num_steps must be at most the {total} timesteps of the table, got {num_steps}"
        )
    match spacing:
        case "leading":
            stride = total // num_steps
            # the offset never leaves the table: with N = T only 0 fits
            offset = min(steps_offset, total - 1 - (num_steps - 1) * stride)
            return np.arange(num_steps) * stride + offset
        case "trailing":
            grid = np.round(np.arange(total, 0, -total / num_steps))[:num_steps]
            return grid[::-1].astype(np.int64) - 1
        case "linspace":
            # one step starts at the noise end; numpy would put it at t = 0
            low = 0 if num_steps > 1 else total - 1
            return np.linspace(low, total - 1, num_steps).round().astype(np.int64)
        case _:
            raise ValueError(f"spacing must be one of {get_args(Spacing)}, got {spacing!r}")


def _explicit_timesteps(timesteps: Sequence[int], num_train_timesteps: int) -> NDArray[np.int64]:
    given = np.asarray(timesteps)
    if given.ndim != 1 or not len(given) or given.dtype.kind not in "iuf":
        raise ValueError(f"timesteps must be a non-empty list of integers, got {timesteps!r}")
    grid = given[::-1].astype(np.int64)
    if (grid != given[::-1]).any():
        raise ValueError(f"timesteps must be a non-empty list of integers, got {timesteps!r}")
    if (np.diff(grid) <= 0).any() or grid[0] < 0 or grid[-1] >= num_train_timesteps:
        raise ValueError(
            f"timesteps must fall strictly within 0 … {num_train_timesteps - 1}, got {timesteps!r}"
        )
    return grid


def _explicit_sigmas(sigmas: Sequence[float]) -> list[float]:
    given = np.asarray(sigmas)
    if given.ndim != 1 or not len(given) or given.dtype.kind not in "iuf":
        raise ValueError(f"sigmas must be a non-empty list of numbers, got {sigmas!r}")
    # also false of NaN
    if not ((given >= 0) & (given <= 1)).all() or not (np.diff(given) < 0).all():
        raise ValueError(f"sigmas must fall strictly within [0, 1], got {sigmas!r}")
    return [float(sigma) for sigma in given]


def _require_steps(num_steps: Any) -> None:
    if isinstance(num_steps, bool) or not isinstance(num_steps, (int, np.integer)):
        raise TypeError(f"num_steps must be an integer, got {type(num_steps).__name__}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
