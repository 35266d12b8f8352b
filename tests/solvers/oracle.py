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

NodeModel = Callable[[np.ndarray, int], np.ndarray]
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
            outputs.append(model(point, stage.node))
            increment = increment + stage.c * outputs[-1]
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


def raw_output(schedule: NoiseSchedule, node: int, z, x, eps) -> np.ndarray:
    """What a model of the schedule's prediction type returns for the estimates x̂ and ε̂."""
    alpha, sigma = schedule.alpha[node], schedule.sigma[node]
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

    def __call__(self, sample: np.ndarray, node: int) -> np.ndarray:
        z = sample / self.schedule.input_scale[node]
        alpha, sigma = self.schedule.alpha[node], self.schedule.sigma[node]
        centred = (z - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        x = self.mean + alpha * self.std**2 * centred
        return raw_output(self.schedule, node, z, x, sigma * centred)

    def solution(self, node: int, quantile: np.ndarray) -> np.ndarray:
        alpha, sigma = self.schedule.alpha[node], self.schedule.sigma[node]
        return alpha * self.mean + quantile * np.sqrt(alpha**2 * self.std**2 + sigma**2)


@dataclass(frozen=True)
class FrozenVelocityModel:
    """A model whose velocity ε̂ − x̂ is the constant v, whatever z is."""

    schedule: NoiseSchedule
    velocity: np.ndarray

    def __call__(self, sample: np.ndarray, node: int) -> np.ndarray:
        z = sample / self.schedule.input_scale[node]
        alpha, sigma = self.schedule.alpha[node], self.schedule.sigma[node]
        # solve z = α x + σ ε and v = ε − x
        x = (z - sigma * self.velocity) / (alpha + sigma)
        eps = (z + alpha * self.velocity) / (alpha + sigma)
        return raw_output(self.schedule, node, z, x, eps)
