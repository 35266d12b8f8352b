"""Every objective beside an independent transcription of its formula in plain torch."""

import math
from dataclasses import dataclass, field

import torch
from torch.nn.functional import logsigmoid

from inpo_fast.losses import OBJECTIVES

SHAPE = (4, 5, 3)
PAIRS = 6


def batch(pairs=PAIRS, dtype=torch.float32, seed=0, step=1 / 8):
    """policy, reference and target, [2·pairs, …], the policy near its reference as in training."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference, target = torch.randn(
        (3, 2 * pairs, *SHAPE), generator=generator, dtype=torch.float64
    )
    return (reference + step * policy).to(dtype), reference.to(dtype), target.to(dtype)


def halves(e, r):
    """D/2 of peers' table, [P]."""
    w, l = (e - r).chunk(2)  # noqa: E741
    return (w - l) / 2


def dpo(e, r, d, beta):
    return -logsigmoid(-beta * halves(e, r))


def smpo(e, r, d, beta, preference):
    return -logsigmoid(10 * (2 * preference - 1) * -beta * halves(e, r))


def ipo(e, r, d, beta):
    return (-halves(e, r) - 1 / (2 * beta)) ** 2


def dmpo(e, r, d, beta, alpha):
    p = torch.sigmoid(-beta * halves(e, r))
    q = 1 - alpha
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


def dspo(e, r, d, beta):
    c = beta * (1 - torch.sigmoid(-beta * halves(e, r)))
    (e, _), (r, _), (d, _) = e.chunk(2), r.chunk(2), d.chunk(2)
    # |(θ−τ) − c (θ−ref)|² with 2⟨θ−τ, θ−ref⟩ = |θ−τ|² + |θ−ref|² − |ref−τ|²
    return e - c * (e + d - r) + c**2 * d


def inversion_dpo(e, r, d, beta, alphas_cumprod):
    w, l = (d / (2 * alphas_cumprod)).chunk(2)  # noqa: E741
    return -logsigmoid(beta / 2 * (w - l))


def mapo(e, r, d, beta):
    x = 0.5 * e
    w, l = (x / (torch.exp(x) - 1)).chunk(2)  # noqa: E741
    return e.chunk(2)[0] - beta * logsigmoid(1000 * (w - l))


def kto(e, r, d, beta, desirable, kl=None):
    gain = r - e
    kl = gain.mean().detach().clamp(min=0) if kl is None else kl
    return 1 - torch.sigmoid((2.0 * desirable - 1) * beta * (gain - kl))


def sft(e, r, d):
    return e


@dataclass(frozen=True)
class Case:
    name: str
    formula: object
    settings: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)
    """Per-pair (or per-row) tensors, float64."""

    @property
    def objective(self):
        return OBJECTIVES[self.name]

    def reference(self, reference):
        return reference if self.objective.needs_reference else None

    def given(self, dtype, rows=None):
        """The inputs as a caller has them; `rows` picks pairs."""
        inputs = {}
        for key, value in self.inputs.items():
            picked = value if rows is None else value[rows(len(value))]
            inputs[key] = picked if picked.dtype == torch.bool else picked.to(dtype)
        return inputs

    def loss(self, policy, reference, target, rows=None, **options):
        dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
        return self.objective.function(
            policy,
            self.reference(reference),
            target,
            **self.settings,
            **self.given(dtype, rows),
            **options,
        )

    def plain(self, policy, reference, target):
        """[P] or [B] losses by the formula, in the precision of the arguments."""
        dims = tuple(range(1, policy.dim()))
        e = ((policy - target) ** 2).mean(dims)
        r = ((reference - target) ** 2).mean(dims)
        d = ((policy - reference) ** 2).mean(dims)
        inputs = {
            key: value if value.dtype == torch.bool else value.to(e.dtype)
            for key, value in self.inputs.items()
        }
        return self.formula(e, r, d, **self.settings, **inputs)


PREFERENCE = torch.tensor([0.9, 0.6, 0.75, 0.99, 0.5, 0.3], dtype=torch.float64)
LEVELS = torch.linspace(0.05, 0.95, 2 * PAIRS, dtype=torch.float64)
DESIRABLE = torch.arange(2 * PAIRS) % 3 != 0

CASES = {
    case.name: case
    for case in (
        Case("inpo", dpo, {"beta": 20.0}),
        Case("dpo", dpo, {"beta": 20.0}),
        Case("smpo", smpo, {"beta": 5.0}, {"preference": PREFERENCE}),
        Case("ipo", ipo, {"beta": 5.0}),
        Case("dmpo", dmpo, {"beta": 20.0, "alpha": 0.01}),
        Case("dspo", dspo, {"beta": 5.0}),
        Case("inversion-dpo", inversion_dpo, {"beta": 20.0}, {"alphas_cumprod": LEVELS}),
        Case("mapo", mapo, {"beta": 0.1}),
        Case("kto", kto, {"beta": 5.0}, {"desirable": DESIRABLE}),
        Case("sft", sft),
    )
}
LOG_SIGMOID = ("inpo", "dpo", "smpo")
LN2 = math.log(2)
