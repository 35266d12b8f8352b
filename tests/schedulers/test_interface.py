"""diffusers' scheduler interface: what its common scheduler tests ask for, and its config."""

import inspect
import json
from fractions import Fraction

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.utils import DummyObject

import inpo_fast
from inpo_fast import schedulers
from tests.schedulers.cases import CLASSES, FORWARD, INVERSE, STABLE_DIFFUSION, normal

pytestmark = pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")

CONFIGS = [
    {},
    STABLE_DIFFUSION,
    {"num_train_timesteps": 100},
    {"beta_start": 0.01, "beta_end": 0.2},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"steps_offset": 1},
    {"set_alpha_to_one": False},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


def reloaded(scheduler, folder):
    scheduler.save_pretrained(folder)
    return type(scheduler).from_pretrained(folder)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_saved_scheduler_does_the_same_step(cls, config, tmp_path):
    if cls in INVERSE and config.get("beta_end") == 0.2:
        return  # refused, see below
    one = cls(**config)
    other = reloaded(one, tmp_path)
    assert {k: v for k, v in one.config.items() if k != "_use_default_values"} == other.config
    sample = normal(4, 3, 8, 8)
    for scheduler in (one, other):
        scheduler.set_timesteps(50)
    # on the grid and between its timesteps
    for t in (0, 1, 49):
        results = [s.step(0.1 * sample, t, sample, eta=0.0).prev_sample for s in (one, other)]
        assert results[0].shape == sample.shape and results[0].isfinite().all()
        assert torch.equal(*results)
        # from t = 0 to its own noise level there is nothing to do
        assert t == 0 or not torch.equal(results[0], sample)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("steps", [1, 2, 10, 500, 1000])
def test_any_number_of_steps(cls, steps):
    scheduler = cls(**STABLE_DIFFUSION)
    scheduler.set_timesteps(steps)
    sample = normal(2, 3)
    for t in scheduler.timesteps[-2:]:
        sample = scheduler.step(0.1 * sample, t, sample).prev_sample
    assert sample.isfinite().all()
    assert len(scheduler.timesteps) == steps * scheduler.order
    assert scheduler.num_inference_steps == steps


@pytest.mark.parametrize("cls", CLASSES)
def test_trained_betas_survive_saving(cls, tmp_path):
    one = cls(trained_betas=np.array([0.1, 0.3]), num_train_timesteps=2)
    other = reloaded(one, tmp_path)
    assert one.betas.tolist() == other.betas.tolist() == torch.tensor([0.1, 0.3]).tolist()
    assert torch.equal(other.alphas_cumprod, DDIMScheduler(trained_betas=[0.1, 0.3]).alphas_cumprod)


@pytest.mark.parametrize("cls", CLASSES)
def test_tuple_and_output_hold_the_same(cls):
    scheduler = cls()
    sample = normal(2, 3)
    results = []
    for return_dict in (True, False):
        scheduler.set_timesteps(10)
        t = scheduler.timesteps[0]
        results.append(scheduler.step(0.1 * sample, t, sample, return_dict=return_dict))
    assert isinstance(results[1], tuple)
    assert torch.equal(results[0].prev_sample, results[1][0])
    assert torch.equal(results[0].pred_original_sample, results[1][1])
    assert results[0].to_tuple()[0] is results[0].prev_sample


@pytest.mark.parametrize("cls", CLASSES)
def test_public_names(cls):
    scheduler = cls()
    assert scheduler.init_noise_sigma == 1.0
    assert len(scheduler) == 1000
    assert scheduler.order == (2 if "EDICT" in cls.__name__ else 1)
    assert scheduler.step_index is scheduler.begin_index is scheduler.state is None
    expected = torch.arange(1000) if cls in INVERSE else torch.arange(999, -1, -1)
    assert torch.equal(scheduler.timesteps, expected)
    sample = normal(2, 3)
    assert torch.equal(scheduler.scale_model_input(sample, 0.0), sample)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.dtype == torch.long
    assert torch.equal(scheduler.scale_model_input(sample, scheduler.timesteps[3]), sample)
    parameters = inspect.signature(cls.__init__).parameters
    assert "kwargs" not in parameters and cls._deprecated_kwargs == []
    ddim = inspect.signature(DDIMScheduler.step).parameters
    assert list(inspect.signature(cls.step).parameters) == list(ddim)
    scheduler.dummy = 5
    assert scheduler.dummy == 5
    scheduler.register_to_config(extra=5)
    with pytest.warns(FutureWarning):
        assert scheduler.extra == 5
    with pytest.raises(AttributeError, match=f"'{cls.__name__}' object has no attribute 'nothing'"):
        _ = scheduler.nothing


@pytest.mark.parametrize("cls", CLASSES)
def test_the_tables_are_those_of_ddim(cls):
    for config in (STABLE_DIFFUSION, {"rescale_betas_zero_snr": True}):
        ours, ddim = cls(**config), DDIMScheduler(**config)
        for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
            assert torch.equal(getattr(ours, name), getattr(ddim, name))
        sample, noise, t = normal(2, 3), normal(2, 3, seed=1), torch.tensor([3, 700])
        assert torch.equal(ours.add_noise(sample, noise, t), ddim.add_noise(sample, noise, t))
        assert torch.equal(ours.get_velocity(sample, noise, t), ddim.get_velocity(sample, noise, t))


@pytest.mark.parametrize("cls", FORWARD)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_timesteps_are_those_of_ddim(cls, spacing, offset):
    config = {"timestep_spacing": spacing, "steps_offset": offset}
    ours, ddim = cls(**config), DDIMScheduler(**config)
    for steps in (2, 7, 30, 50, 999):
        ours.set_timesteps(steps)
        ddim.set_timesteps(steps)
        assert torch.equal(ours.timesteps, ddim.timesteps.repeat_interleave(ours.order))
    ours.set_timesteps(timesteps=[900, 500, 3])
    repeated = [t for t in (900, 500, 3) for _ in range(ours.order)]
    assert ours.timesteps.tolist() == repeated


def test_the_inverse_lists_its_model_calls():
    expected = {
        schedulers.BDIAInverseScheduler: [0, 1, 251, 501],
        schedulers.OBELMInverseScheduler: [0, 1, 251, 501],
        schedulers.EDICTInverseScheduler: [1, 1, 251, 251, 501, 501, 751, 751],
    }
    for cls, times in expected.items():
        scheduler = cls(**STABLE_DIFFUSION)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == times
        one = scheduler.timesteps.clone()
        scheduler.set_timesteps(timesteps=[751, 501, 251, 1])
        assert torch.equal(scheduler.timesteps, one)


@pytest.mark.parametrize("cls", CLASSES)
def test_from_the_configs_of_other_schedulers(cls, caplog):
    for other in (
        DDIMScheduler,
        PNDMScheduler,
        EulerDiscreteScheduler,
        DPMSolverMultistepScheduler,
    ):
        config = other(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
        ).config
        ours = cls.from_config(config)
        assert ours.config.beta_schedule == "scaled_linear"
        assert ours.config.prediction_type == "v_prediction"
        assert ours.config.timestep_spacing == "trailing"
        assert ours.config.clip_sample is False
        back = other.from_config(ours.config)
        assert {k: back.config[k] for k in config if k[0] != "_"} == {
            k: v for k, v in config.items() if k[0] != "_"
        }
    # the way of a pipeline's saved scheduler, with keys that only others know
    stored = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **STABLE_DIFFUSION}
    assert cls.from_config(stored).config.skip_prk_steps is True
    assert cls.from_config(stored, steps_offset=0).config.steps_offset == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("cls", CLASSES)
def test_every_compatible_class_gives_the_config_back(cls):
    scheduler = cls(num_train_timesteps=100, beta_start=0.0001, beta_end=0.02)
    assert DDIMScheduler in scheduler.compatibles
    for other in scheduler.compatibles:
        if isinstance(other, DummyObject):  # needs a library that is not here
            continue
        back = cls.from_config(other.from_config(scheduler.config).config)
        mine = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
        assert {k: back.config[k] for k in mine} == mine, other


def test_weights_of_solvers_are_config(tmp_path):
    for name, cls, weight in (
        ("gamma", schedulers.BDIAScheduler, Fraction(15, 16)),
        ("gamma", schedulers.BDIAInverseScheduler, Fraction(1, 3)),
        ("mixing_coeff", schedulers.EDICTScheduler, Fraction(93, 100)),
    ):
        scheduler = reloaded(cls(**{name: weight}), tmp_path)
        assert scheduler.config[name] == float(weight)
        assert json.loads((tmp_path / "scheduler_config.json").read_text())[name] == float(weight)
        scheduler.set_timesteps(5)
        scheduler.step(normal(2), scheduler.timesteps[0], normal(2))
        multipliers = {u.a for u in scheduler._run.plan.program.updates}
        assert weight in multipliers
    inverse = schedulers.BDIAInverseScheduler.from_config(
        schedulers.BDIAScheduler(gamma=0.75).config
    )
    assert inverse.config.gamma == 0.75
    assert schedulers.EDICTScheduler().config.mixing_coeff == 0.93
    assert schedulers.BDIAScheduler().config.gamma == 1.0


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"thresholding": True}, "thresholding must be False"),
        ({"prediction_type": "flow_prediction"}, "prediction_type must be one of"),
        ({"timestep_spacing": "karras"}, "timestep_spacing must be one of"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule must be one of.*trained_betas"),
    ],
)
def test_refused_configs(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls(**config)
    with pytest.raises(ValueError, match=message):
        cls.from_config({**STABLE_DIFFUSION, **config})


def test_refused_weights():
    for gamma in (0, -0.5, 1.01, float("nan")):
        with pytest.raises(ValueError, match="gamma must be in"):
            schedulers.BDIAScheduler(gamma=gamma)
    for p in (0.5, 1.01, float("nan")):
        with pytest.raises(ValueError, match="mixing_coeff must be in"):
            schedulers.EDICTInverseScheduler(mixing_coeff=p)
    with pytest.raises(TypeError, match="gamma must be a number, got '1'"):
        schedulers.BDIAScheduler(gamma="1")
    with pytest.raises(TypeError, match="mixing_coeff must be a number, got '1'"):
        schedulers.EDICTScheduler(mixing_coeff="1")


@pytest.mark.parametrize("cls", CLASSES)
def test_schedulers_without_such_a_table_are_refused(cls):
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    multistep = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    ).config
    for config in (flow, EDMEulerScheduler().config, multistep):
        with pytest.raises(ValueError, match=r"variance-preserving.*inpo_fast\.Sampler"):
            cls.from_config(config)


@pytest.mark.parametrize("cls", CLASSES)
def test_refused_grids(cls):
    scheduler = cls(**STABLE_DIFFUSION)
    sample = normal(2, 3)
    with pytest.raises(ValueError, match="set_timesteps must be called first"):
        scheduler.step(sample, 1, sample)
    for arguments, message in (
        ({}, "exactly one of"),
        ({"num_inference_steps": 5, "timesteps": [1]}, "exactly one of"),
        ({"num_inference_steps": 0}, r"^num_inference_steps must be at least 1"),
        ({"num_inference_steps": 1001}, r"^num_inference_steps must be at most"),
        ({"timesteps": []}, "timesteps must fall"),
        ({"timesteps": [1, 5]}, "timesteps must fall"),
        ({"timesteps": [1000, 5]}, "timesteps must fall"),
        ({"timesteps": [5, 5]}, "timesteps must fall"),
        ({"timesteps": [5.5]}, "timestep must be an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(**arguments)
    with pytest.raises(TypeError, match=r"^num_inference_steps must be an integer, got float"):
        scheduler.set_timesteps(5.0)
    assert scheduler.num_inference_steps is None
    with pytest.raises(ValueError, match="trained_betas must have num_train_timesteps"):
        cls(trained_betas=[0.1, 0.2]).set_timesteps(2)


@pytest.mark.parametrize("cls", CLASSES)
def test_refused_steps(cls):
    scheduler = cls(**STABLE_DIFFUSION)
    scheduler.set_timesteps(5)
    sample, t = normal(2, 3), scheduler.timesteps[0]
    for arguments, message in (
        ({"eta": 0.5}, "eta must be 0"),
        ({"variance_noise": sample}, "variance_noise must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.step(sample, t, sample, **arguments)
    for bad, message in (
        (1000, "within 0 … 999"),
        (-1, "within 0 … 999"),
        (0.5, "must be an integer"),
        (torch.tensor([1, 2]), "one number for the batch"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.step(sample, bad, sample)
    with pytest.raises(TypeError, match="sample must be a floating tensor"):
        scheduler.step(sample, t, sample.int())
    with pytest.raises(ValueError, match="m1 must have the shape"):
        scheduler.step(sample[:1], t, sample)
    with pytest.raises(ValueError, match="timestep must be one of"):
        scheduler.index_for_timestep(2)
    assert scheduler.index_for_timestep(scheduler.timesteps[-1]) == (
        len(scheduler.timesteps) - scheduler.order if cls.order == 2 else 4
    )


@pytest.mark.parametrize("cls", FORWARD)
def test_epsilon_at_zero_snr_is_refused(cls):
    scheduler = cls(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="epsilon prediction is undefined at node 5"):
        scheduler.step(normal(2), scheduler.timesteps[0], normal(2))


@pytest.mark.parametrize("cls", INVERSE)
def test_a_table_that_is_all_noise_is_refused(cls):
    scheduler = cls(beta_start=0.01, beta_end=0.2)
    scheduler.set_timesteps(50)
    # where the noise stops growing in float64, not a list of all nodes
    with pytest.raises(ValueError, match=r"noise must grow.* = 1.0 at node 42 \(timestep 820\)"):
        scheduler.step(normal(2), scheduler.timesteps[0], normal(2))


def test_lazy_names():
    assert inpo_fast.BDIAScheduler is schedulers.BDIAScheduler
    assert set(schedulers.__all__) <= set(dir(inpo_fast))
    for name in schedulers.__all__:
        cls = getattr(inpo_fast, name)
        assert cls in CLASSES
        # what diffusers needs to load a component of another library
        module = inspect.getmodule(cls)
        assert module.SchedulerMixin is diffusers.SchedulerMixin
        assert module.__name__.startswith("inpo_fast.schedulers.scheduling_")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = inpo_fast.nothing
