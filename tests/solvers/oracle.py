"""Independent oracles for solver programs: a numpy interpreter and models with known answers.

Nothing here uses the sampler, the operators or the coefficients' derivation: a program is data, and
`interpret` is the shortest reading of what its documentation says that the data mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from inpo_fast.schedule import NoiseSchedule
from inpo_fast.solvers import Program

NodeModel = Callable[[np.ndarray, float], np.ndarray]
"""model(sample, node) → raw output, in the numpy dtype of the sample."""


def interpret(
    program: Program, model: NodeModel, tracks: list[np.ndarray | None]
) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
    """Yield the tracks before the first update and after every one."""
    tracks = list(tracks)
    yield tuple(tracks)
    for u in program.updates:
        other = tracks[1 - u.track]
        increment, outputs = u.b * other, []
        for stage in u.stages:
            point = stage.p * other
            for q, output in zip(stage.q, outputs, strict=True):
                point = point + q * output
            if u.recall and not outputs:
                point = point + u.recall[1] * tracks[u.track]
            outputs.append(model(point, stage.node))
            increment = increment + stage.c * outputs[-1]
        if u.recall:
            increment = increment + u.recall[0] * tracks[u.track]
        a = float(u.a)
        if u.inverse:
            tracks[u.track] = (tracks[u.track] - increment) / a
        elif u.a == 0:
            tracks[u.track] = increment
        else:
            tracks[u.track] = a * tracks[u.track] + increment
        yield tuple(tracks)


def run(program: Program, model: NodeModel, tracks: list[np.ndarray | None]):
    """The tracks after the last update."""
    *_, last = interpret(program, model, tracks)
    return last


def start(program: Program, z: np.ndarray) -> list[np.ndarray | None]:
    """`z` on the input track of a program that starts from one track."""
    tracks: list[np.ndarray | None] = [None, None]
    tracks[program.input] = z / program.start[program.input]
    return tracks


def sample(program: Program, tracks) -> np.ndarray:
    """z on the output track at the end of the program."""
    return tracks[program.output] * program.end[program.output]


def level(schedule: NoiseSchedule, node: float) -> tuple[float, float, float]:
    """α, σ and the scale of the model's input at a node, or midway in ln(α/σ) at i + 1/2."""
    low = int(node)
    if node == low:
        return schedule.alpha[low], schedule.sigma[low], schedule.input_scale[low]
    assert node == low + 0.5
    # the geometric mean of the two noise-to-signal ratios
    ratio = np.sqrt(np.prod(schedule.sigma[low : low + 2] / schedule.alpha[low : low + 2]))
    norm = {"vp": np.hypot(1, ratio), "ve": 1.0, "flow": 1 + ratio}[schedule.kind]
    sigma = ratio / norm
    edm = schedule.prediction_type == "edm"
    return 1 / norm, sigma, 1 / np.hypot(sigma, schedule.sigma_data) if edm else 1.0


def raw_output(schedule: NoiseSchedule, node: float, z, x, eps) -> np.ndarray:
    """What a model of the schedule's prediction type returns for the estimates x̂ and ε̂."""
    alpha, sigma, _ = level(schedule, node)
    match schedule.prediction_type:
        case "epsilon":
            return eps
        case "sample":
            return x
        case "v_prediction":
            return alpha * eps - sigma * x
        case "flow":
            return eps - x
        case "edm":
            data = schedule.sigma_data
            total = np.hypot(sigma, data)
            return (x - (data / total) ** 2 * z) * total / (sigma * data)


@dataclass(frozen=True)
class GaussianModel:
    """The ideal model for data x ~ N(mean, std²), elementwise: its output is affine in z.

    The probability-flow ODE keeps every sample at its quantile, so that its solution is known:
    z(node) = α mean + q √(α² std² + σ²).
    """

    schedule: NoiseSchedule
    mean: np.ndarray
    std: np.ndarray

    def __call__(self, sample: np.ndarray, node: float) -> np.ndarray:
        alpha, sigma, input_scale = level(self.schedule, node)
        z = sample / input_scale
        centred = (z - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        x = self.mean + alpha * self.std**2 * centred
        return raw_output(self.schedule, node, z, x, sigma * centred)

    def solution(self, node: int, quantile: np.ndarray) -> np.ndarray:
        alpha, sigma = self.schedule.alpha[node], self.schedule.sigma[node]
        return alpha * self.mean + quantile * np.sqrt(alpha**2 * self.std**2 + sigma**2)


@dataclass(frozen=True)
class MixtureModel:
    """The ideal model for data from a mixture of Gaussians on the line, elementwise; nonlinear.

    Attributes:
        weight, mean, std: [K] of the components.
    """

    schedule: NoiseSchedule
    weight: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    def __call__(self, sample: np.ndarray, node: float) -> np.ndarray:
        alpha, sigma, input_scale = level(self.schedule, node)
        z = sample / input_scale
        variance = alpha**2 * self.std**2 + sigma**2  # [K]
        centred = (z[..., None] - alpha * self.mean) / variance  # [..., K]
        log = np.log(self.weight) - np.log(variance) / 2 - centred**2 * variance / 2
        share = np.exp(log - log.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        x = (share * (self.mean + alpha * self.std**2 * centred)).sum(axis=-1)
        eps = sigma * (share * centred).sum(axis=-1)
        return raw_output(self.schedule, node, z, x, eps)

    def solution(self, source: int, target: int, z: np.ndarray) -> np.ndarray:
        """z at node `target` of the ODE's solution through z at `source`, by quantiles: the ODE
        moves the marginal distributions into each other, so it keeps the distribution function."""
        from math import erf

        def cdf(value, node):
            alpha, sigma = self.schedule.alpha[node], self.schedule.sigma[node]
            deviation = np.sqrt(alpha**2 * self.std**2 + sigma**2)
            argument = (value[..., None] - alpha * self.mean) / (deviation * 2**0.5)
            return (self.weight * (1 + np.vectorize(erf)(argument)) / 2).sum(axis=-1)

        goal = cdf(z, source)
        low, high = np.full_like(z, -200.0), np.full_like(z, 200.0)
        for _ in range(80):
            middle = (low + high) / 2
            below = cdf(middle, target) < goal
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2


@dataclass(frozen=True)
class FrozenVelocityModel:
    """A model whose velocity ε̂ − x̂ is the constant v, whatever z is."""

    schedule: NoiseSchedule
    velocity: np.ndarray

    def __call__(self, sample: np.ndarray, node: float) -> np.ndarray:
        alpha, sigma, input_scale = level(self.schedule, node)
        z = sample / input_scale
        # solve z = α x + σ ε and v = ε − x
        x = (z - sigma * self.velocity) / (alpha + sigma)
        eps = (z + alpha * self.velocity) / (alpha + sigma)
        return raw_output(self.schedule, node, z, x, eps)
