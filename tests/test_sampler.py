"""The sampler: exact round trips, states on disk, guidance, errors, and what it does not do."""

import copy
import dataclasses
import hashlib
import json
import pickle
import re
import subprocess
import sys
import threading
import time
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from inpo_fast import (
    AmplificationWarning,
    LatticeRangeError,
    NoiseSchedule,
    NonFiniteError,
    Program,
    Sampler,
    Stage,
    State,
    Update,
    bdia,
    ddim,
    dpmpp_2m,
    edict,
    heun,
    mccallum_foster,
    obelm,
)
from inpo_fast.schedule import scaled_linear_alphas_cumprod
from tests.solvers import oracle

pytestmark = pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")

TABLE = scaled_linear_alphas_cumprod()
SHAPE = (3, 4, 5, 7)
BATCH = SHAPE[0]


def staged(grid, direction="sample"):
    """A program of one's own whose updates evaluate the model up to four times, on both tracks."""

    first, second = min(3, grid.num_steps), min(2, grid.num_steps)
    time = int if grid.discrete else float

    def stage(c, q):
        return Stage(c, second, time(grid.timesteps[second]), p=0.75, q=q)

    def update(track, a, later):
        options = {"node": first, "timestep": time(grid.timesteps[first]), "model_scale": 1.25}
        return Update(track, a, 0.25, c=0.5, later=later, **options)

    copy = Update(1, Fraction(0), 1.0)
    updates = (
        copy,
        update(0, Fraction(15, 16), (stage(0.25, (0.5,)), stage(-0.25, (0.5, 0.0)))),
        update(1, Fraction(1), (stage(0.0, (0.0,)),)),
        Update(0, Fraction(17, 16), -0.25),
        update(1, Fraction(7, 8), tuple(stage(0.25, (0.25,) * k) for k in (1, 2, 3))),
    )
    program = Program("staged", updates, (1.0, None), input=0, output=0, order=1)
    if direction == "sample":
        return program
    back = (copy, *(u.inverted() for u in reversed(updates[1:])))
    return Program("staged inversion", back, (1.0, None), input=0, output=0, order=1)


SOLVERS = {
    "bdia-1": bdia,
    "bdia-15/16": lambda s, **k: bdia(s, gamma=Fraction(15, 16), **k),
    "edict": edict,
    "obelm": obelm,
    "bdia-heun": lambda s, **k: bdia(s, integrator="heun", gamma=Fraction(15, 16), **k),
    "bdia-2s": lambda s, **k: bdia(s, integrator="dpm++2s", **k),
    "mccallum-foster": mccallum_foster,
    "mccallum-foster-heun": lambda s, **k: mccallum_foster(s, integrator="heun", **k),
    "staged": staged,
}

# the last one has no inversion
FORGETFUL = {
    "ddim": ddim,
    "heun": heun,
    "dpm++2m": lambda s, direction: dpmpp_2m(s),
}
EVERY = {**SOLVERS, **FORGETFUL}

solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
directions = pytest.mark.parametrize("direction", ["invert", "sample"])


def schedule(num_steps=10, **options):
    return NoiseSchedule.from_alphas_cumprod(TABLE, num_steps, steps_offset=1, **options)


def image(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Network:
    """A smooth nonlinear model of additions, products and quotients.

    These are rounded correctly whatever the batch, the layout and the vector width, so that a
    difference in bits is the sampler's. With guidance the second half of the batch has another
    condition. Counts what it is called on.
    """

    def __init__(self, batch=BATCH):
        self.batch = batch
        self.calls = []

    def __call__(self, x, t):
        self.calls.append((tuple(x.shape), x.dtype, t.shape, t.dtype, x.is_contiguous()))
        condition = torch.ones(len(x), dtype=x.dtype)
        if len(x) == 2 * self.batch:
            condition[: self.batch] = -0.5
        return self.predict(x, t, condition)

    @staticmethod
    def predict(x, t, condition):
        column = [-1, *[1] * (x.dim() - 1)]
        level = (t.double() / 1000).to(x.dtype).reshape(column)
        y = x + x.roll(1, -1) / 2 + condition.reshape(column) * level
        return y / (1 + y * y) + x / 2


def round_trip(program, sample, **options):
    """The state at the start, after the program and after its inverse."""
    network = Network(len(sample))
    first = Sampler(network, program, **options)
    middle = first.run(sample)
    back = Sampler(network, program.inverse(), **options).run(middle)
    return first.start(sample), middle, back


def same_bits(first: State, second: State) -> bool:
    """Every tensor of both states, present in both or in neither."""
    for a, b in zip(
        (*first.tracks, *first.buffers), (*second.tracks, *second.buffers), strict=True
    ):
        if (a is None) != (b is None) or (a is not None and not torch.equal(a, b)):
            return False
    return True


# --- Exactness --------------------------------------------------------------------------------

GUIDANCE = {"1": 1.0, "3": 3.0, "7.5": 7.5, "per-sample": [1.0, 3.0, 7.5]}


@solvers
@directions
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
def test_round_trips_are_exact_to_the_bit(solver, direction, model_dtype, guidance):
    program = solver(schedule(), direction=direction)
    start, middle, back = round_trip(
        program, image(), model_dtype=model_dtype, guidance_scale=guidance
    )
    assert torch.equal(back.tracks[program.input], start.tracks[program.input])
    if program.scales:
        # the bits that scaling would lose are all given back
        assert torch.equal(back.buffers[program.input], torch.zeros(SHAPE, dtype=torch.int64))
    assert back.equal(start) and not middle.equal(start)
    # the run did something: neither end is the other
    assert (middle.sample() - start.sample()).abs().max() > 0.1


@solvers
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_round_trip_over_fifty_steps(solver, impl):
    program = solver(schedule(50), direction="invert")
    start, _, back = round_trip(program, image(), guidance_scale=3.0, impl=impl)
    assert back.equal(start)


@pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")
@pytest.mark.parametrize("direction", ["sample", "invert"])
def test_tracks_that_are_scaled_far_outside_the_lattice_come_back(direction):
    """O-BELM on steps of 1 and 48 multiplies by 2^16, and the increment brings that back."""
    given = [999, 998, 950, 900, 700, 400, 100, 1]
    grid = NoiseSchedule.from_alphas_cumprod(TABLE, timesteps=given)
    program = obelm(grid, direction=direction)
    assert max(update.a for update in program.updates) > 2**10
    scale = 1.0 if direction == "sample" else 0.2
    there = Sampler(lambda x, t: x.tanh() / 10, program)
    back = Sampler(lambda x, t: x.tanh() / 10, program.inverse())
    z = scale * image()
    assert back.run(there.run(z)).equal(there.start(z))


@solvers
def test_edited_and_undone(solver):
    """Back with another condition, and that run undone again: the buffers carry it all."""
    program = solver(schedule(), direction="invert")
    inverted = Sampler(Network(), program).run(image())
    decode = Sampler(lambda x, t: Network()(x, t) * 0.9, program.inverse())
    edited = decode.run(inverted)
    assert not edited.equal(Sampler(Network(), program).start(image()))
    undo = Sampler(decode.model, program.inverse().inverse())
    again = undo.run(edited)
    assert same_bits(again, inverted)


@directions
@pytest.mark.parametrize("frac_bits", [12, 20, 24])
def test_frac_bits(direction, frac_bits):
    program = SOLVERS["bdia-15/16"](schedule(), direction=direction)
    start, _, back = round_trip(program, image(), frac_bits=frac_bits)
    assert back.equal(start) and back.frac_bits == frac_bits
    # the lattice is the only loss: half a step of it
    assert (start.sample() - image()).abs().max() <= 2.0 ** -(frac_bits + 1) + 2**-23


@pytest.mark.parametrize(
    "grid",
    [
        NoiseSchedule.flow(8, shift=3),
        NoiseSchedule.edm(8, sigma_max=10),
        schedule(8, prediction_type="v_prediction"),
        schedule(8, prediction_type="sample"),
        NoiseSchedule.from_alphas_cumprod(TABLE, timesteps=[900, 600, 590, 300, 10]),
        schedule(1),
        schedule(2),
    ],
    ids=["flow", "edm", "v", "sample", "explicit", "one-step", "two-steps"],
)
@solvers
@directions
@pytest.mark.parametrize("guidance", [1.0, [1.0, 3.0, 7.5]], ids=["1", "per-sample"])
def test_round_trips_on_every_kind_of_grid(grid, solver, direction, guidance):
    program = solver(grid, direction=direction)
    start, _, back = round_trip(program, image(), guidance_scale=guidance)
    assert back.equal(start)


@solvers
@directions
@pytest.mark.parametrize(
    ("state", "eps"),
    [("float64", 2**-52), ("float32", 2**-23), ("float16", 2**-10), ("bfloat16", 2**-7)],
)
def test_float_states_come_back_within_their_amplification(solver, direction, state, eps):
    program = solver(schedule(), direction=direction)
    dtype = torch.float64 if state == "float64" else torch.float32
    start, middle, back = round_trip(program, image(), state=state, model_dtype=dtype)
    assert back.sample().dtype == middle.sample().dtype == getattr(torch, state)
    size = max(s.sample().double().abs().max().item() for s in (start, middle))
    error = (back.sample().double() - start.sample().double()).abs().max().item()
    # Every update rounds its track once, by eps/2 of its size, and once more on the way back: eps
    # in all, magnified by at most the amplification. Roundings of ten steps and of two tracks are
    # independent, and the network, whose slope is at most 2, magnifies a little more.
    assert error <= 8 * eps * program.inverse().amplification * size
    if state != "float64":
        # and it is not exact: that is what the lattice is for
        assert error > 0


# --- What is run ------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", EVERY.values(), ids=EVERY)
@directions
@pytest.mark.parametrize("state", ["float64", "lattice"])
def test_runs_are_what_the_program_says(solver, direction, state):
    """Against the interpreter in numpy, which knows nothing of tensors, lattices and operators."""
    grid = schedule()
    program = solver(grid, direction=direction)
    dtype = torch.float64 if state == "float64" else torch.float32

    def model(x, node):
        batch = torch.from_numpy(x).to(dtype)
        t = torch.full((BATCH,), grid.point(node).timestep)
        return Network()(batch, t).double().numpy()

    z = image().double()
    tracks = oracle.run(program, model, oracle.start(program, z.numpy()))
    expected = oracle.sample(program, tracks)
    end = Sampler(Network(), program, state=state, model_dtype=dtype).run(z)
    got = end.sample().double().numpy()
    # One update rounds the sum, the model's input and its output: 4 eps of the largest state, and
    # half a step of the lattice. Scaling by n/d on the lattice is up to 1 + n/d steps off, besides.
    if state == "float64":
        unit, moved = 1.0, 4 * 2.0**-52
    else:
        unit = 2.0**-20
        scales = [1 + max(u.a, 1 / u.a) for u in program.updates if u.a not in (0, 1)]
        moved = 4 * 2.0**-20 + 2.0**-20 * float(max(scales, default=0))
    largest = max(1.0, *(abs(t).max() for t in tracks))
    for j in (0, 1):
        got = end.tracks[j].double().numpy() * unit * program.end[j]
        error = np.abs(got - tracks[j] * program.end[j]).max()
        assert error <= 4 * moved * program.amplification * largest
    assert np.abs(end.sample().double().numpy() - expected).max() <= (
        4 * moved * program.amplification * largest
    )


@pytest.mark.parametrize("solver", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("guidance", [1.0, 4.0, [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
def test_one_model_call_a_step(solver, guidance):
    network = Network()
    program = solver(schedule(), direction="invert")
    Sampler(network, program, guidance_scale=guidance, model_dtype=torch.bfloat16).run(image())
    copies = 1 if np.all(np.asarray(guidance) == 1) else 2
    batch = copies * BATCH
    # a time between two nodes is no index of the table
    whole = all(isinstance(stage.timestep, int) for u in program.updates for stage in u.stages)
    time = torch.int64 if whole else torch.float32
    assert whole == ("dpm++2s" not in program.name)
    expected = ((batch, *SHAPE[1:]), torch.bfloat16, (batch,), time, True)
    assert network.calls == [expected] * program.model_calls


@pytest.mark.parametrize("state", ["lattice", "float32"])
@solvers
def test_one_guided_call_is_two_calls(solver, state):
    program = solver(schedule())

    def twice(x, t):
        low, high = x.chunk(2)
        assert torch.equal(low, high)
        ones = torch.ones(BATCH, dtype=x.dtype)
        return torch.cat(
            [
                Network.predict(low, t[:BATCH], -0.5 * ones),
                Network.predict(high, t[BATCH:], ones),
            ]
        )

    options = {"guidance_scale": 7.5, "state": state}
    together = Sampler(Network(), program, **options).run(image())
    apart = Sampler(twice, program, **options).run(image())
    assert same_bits(together, apart)


@solvers
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_guidance_extrapolates_the_noise(solver, kind):
    """ε = ε_u + w (ε_c − ε_u), here done by the model itself, for each sample's own w."""
    program = solver(schedule(prediction_type=kind))
    scale = torch.tensor([1.0, 3.0, -0.5], dtype=torch.float64)

    def guided(x, t):
        ones = torch.ones(BATCH, dtype=x.dtype)
        low = Network.predict(x, t, -0.5 * ones)
        high = Network.predict(x, t, ones)
        return low + scale.reshape(-1, 1, 1, 1) * (high - low)

    options = {"state": "float64", "model_dtype": torch.float64}
    expected = Sampler(guided, program, **options).run(image()).sample()
    sampler = Sampler(Network(), program, guidance_scale=scale.tolist(), **options)
    got = sampler.run(image()).sample()
    # the terms c_u m_u + c_c m_c round where the sum above does, w times a rounding
    assert (got - expected).abs().max() <= 1e-13 * program.amplification * expected.abs().max()


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        (schedule(4), torch.int64),
        (NoiseSchedule.flow(3), torch.float32),
        # 1000, 500, 0 are whole numbers and still a flow's time
        (NoiseSchedule.flow(2), torch.float32),
        (NoiseSchedule.edm(4), torch.float32),
        (
            NoiseSchedule([0, 10.5, 20], np.cos([0, 0.5, 1.2]), np.sin([0, 0.5, 1.2])),
            torch.float32,
        ),
    ],
    ids=["table", "flow", "flow-whole", "edm", "fractional"],
)
def test_the_model_is_told_its_time(grid, dtype):
    seen = []

    def model(x, t):
        assert t.shape == (len(x),) and t.dtype == dtype
        seen.append(t.unique().item())
        return Network()(x, t)

    for program in (bdia(grid, direction="invert"), bdia(grid)):
        seen.clear()
        state = Sampler(model, program, guidance_scale=2.0).run(image())
        expected = [u.timestep for u in program.updates]
        assert seen == torch.tensor(expected, dtype=torch.float64).to(dtype).tolist()
        # the same dtype on the way back, whichever updates are left
        Sampler(model, program.inverse(), guidance_scale=2.0).run(state)


def test_the_model_may_write_into_its_input():
    def model(x, t):
        output = Network()(x, t)
        x.fill_(torch.nan)
        return output

    for state in ("lattice", "float32"):
        program = edict(schedule())
        expected = Sampler(Network(), program, state=state).run(image())
        assert same_bits(Sampler(model, program, state=state).run(image()), expected)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_model_may_use_the_memory_of_its_last_output(guidance):
    memory = []

    def model(x, t):
        output = Network()(x, t)
        memory[:] = memory or [torch.empty_like(output)]
        return memory[0].copy_(output)

    for state in ("lattice", "float32"):
        program = staged(schedule())
        options = {"state": state, "guidance_scale": guidance}
        expected = Sampler(Network(), program, **options).run(image())
        assert same_bits(Sampler(model, program, **options).run(image()), expected)


@pytest.mark.parametrize("state", ["lattice", "float32"])
def test_a_batch_is_its_samples(state):
    program = edict(schedule(), direction="invert")
    batch = image()
    together = Sampler(Network(), program, state=state, guidance_scale=[2.0, 1.0, 5.0]).run(batch)
    for i, guidance in enumerate([2.0, 1.0, 5.0]):
        alone = Sampler(Network(1), program, state=state, guidance_scale=guidance)
        state_i = alone.run(batch[i : i + 1])
        for j in (0, 1):
            assert torch.equal(state_i.tracks[j][0], together.tracks[j][i])


LAYOUTS = {
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "strided": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("state", ["lattice", "float64"])
def test_layouts_of_the_input_do_not_matter(layout, state):
    given = layout(image())
    assert not given.is_contiguous()
    network = Network()
    program = SOLVERS["bdia-15/16"](schedule())
    dtype = torch.float64 if state == "float64" else torch.float32
    sampler = Sampler(network, program, state=state, model_dtype=dtype)
    got = sampler.run(given)
    assert all(contiguous for *_, contiguous in network.calls)
    assert same_bits(got, sampler.run(given.contiguous()))


@pytest.mark.parametrize("shape", [(1,), (2, 1), (0, 4, 5), (5, 3, 2, 2, 2)])
def test_any_shape(shape):
    for solver in SOLVERS.values():
        program = solver(schedule(5))
        start, middle, back = round_trip(program, image(shape=shape), guidance_scale=2.0)
        assert middle.sample().shape == shape and back.equal(start)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_samples_of_any_floating_dtype(dtype):
    sampler = Sampler(Network(), bdia(schedule()))
    sample = image().to(dtype)
    assert same_bits(sampler.start(sample), sampler.start(sample.double()))
    # the nearest lattice point
    z = (sample.double() * 2**20).round().to(torch.int32)
    assert torch.equal(sampler.start(sample).tracks[0], z)


def test_what_a_caller_gives_is_not_touched():
    for solver in SOLVERS.values():
        for state in ("lattice", "float32"):
            program = solver(schedule())
            sample = image()
            middle = Sampler(Network(), program, state=state).run(sample)
            assert torch.equal(sample, image())
            copies = [None if t is None else t.clone() for t in (*middle.tracks, *middle.buffers)]
            Sampler(Network(), program.inverse(), state=state).run(middle)
            for before, after in zip(copies, (*middle.tracks, *middle.buffers), strict=True):
                assert (before is None and after is None) or torch.equal(before, after)


def test_no_gradient_is_recorded():
    sample = image().requires_grad_()
    weight = torch.ones((), requires_grad=True)
    for state in ("lattice", "float32"):
        sampler = Sampler(lambda x, t: weight * x, bdia(schedule()), state=state)
        assert not sampler.run(sample).sample().requires_grad
        assert not sampler.start(sample).sample().requires_grad


# --- Callbacks and progress -------------------------------------------------------------------


@pytest.mark.parametrize("state", ["lattice", "float32"])
@pytest.mark.parametrize("solver", EVERY.values(), ids=EVERY)
def test_callbacks_come_after_every_update(solver, state):
    grid = schedule()
    program = solver(grid, direction="invert")
    network, seen = Network(), []

    def callback(index, update, current):
        assert update is program.updates[index]
        assert current.position == index + 1 and current.output == update.track
        assert current.scales[update.track] == update.scale
        calls = sum(len(u.stages) for u in program.updates[: index + 1])
        assert len(network.calls) == calls
        seen.append((index, current.sample()))

    end = Sampler(network, program, state=state).run(image(), callback=callback)
    assert [i for i, _ in seen] == list(range(len(program.updates)))
    if program.updates[-1].track == end.output:
        assert torch.equal(seen[-1][1], end.sample())


def test_progress(monkeypatch, capsys):
    program = edict(schedule(7))
    sampler = Sampler(Network(), program)
    sampler.run(image(), progress=True)
    shown = capsys.readouterr().err
    assert "edict(p=93/100)" in shown and "14/14" in shown
    sampler.run(image())
    assert capsys.readouterr().err == ""


def test_stopped_by_an_exception():
    """Nothing changes for the caller, and the saved state goes on where it was."""
    program = edict(schedule())
    sampler, sample = Sampler(Network(), program), image()
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic

    def stop(index, update, state):
        if index == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.run(sample, callback=stop)
    assert torch.equal(sample, image())
    assert before == (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)


@pytest.mark.parametrize("flags", [(True, False, False), (False, True, True)])
def test_cudnn_is_deterministic_inside_and_restored(monkeypatch, flags):
    cudnn = torch.backends.cudnn
    names = ("benchmark", "deterministic", "allow_tf32")
    for name, value in zip(names, flags, strict=True):
        monkeypatch.setattr(cudnn, name, value)
    seen = []

    def model(x, t):
        seen.append((cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32))
        if len(seen) == 15:
            raise RuntimeError("out of memory")
        return x

    sampler = Sampler(model, bdia(schedule()))
    enabled = cudnn.enabled
    sampler.run(image())
    with pytest.raises(RuntimeError, match="out of memory"):
        sampler.run(image())
    # TF32 is the user's choice of precision, not a source of nondeterminism
    assert set(seen) == {(enabled, False, True, flags[2])}
    assert tuple(getattr(cudnn, name) for name in names) == flags


class NoSynchronisation(TorchDispatchMode):
    """Fails on every operation that would wait for a device, while `active`."""

    waiting = (
        "aten._local_scalar_dense",
        "aten.item",
        "aten.is_nonzero",
        "aten.nonzero",
        "aten.equal",
        "aten.masked_select",
        "aten.unique",
        "aten._unique2",
    )

    def __init__(self):
        super().__init__()
        self.active = False
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.active:
            self.operations += 1
            name = str(func)
            assert not name.startswith(self.waiting), name
            # neither a copy to another device nor a tensor made on the host for one
            assert name != "aten._to_copy.default" or kwargs.get("device") is None, name
            assert not name.startswith("aten.lift_fresh"), name
        return func(*args, **kwargs)


@pytest.mark.parametrize("solver", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("state", ["lattice", "float32", "float16"])
@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("guidance", [1.0, [1.0, 2.0, 3.0]], ids=["1", "per-sample"])
def test_the_loop_never_waits_for_the_device(solver, state, impl, guidance):
    program = solver(schedule(5), direction="invert")
    mode, calls = NoSynchronisation(), []

    def model(x, t):
        calls.append(len(x))
        mode.active = len(calls) < program.model_calls
        return x / (1 + x * x)

    def callback(index, update, current):
        assert current.tracks[update.track] is not None

    sampler = Sampler(model, program, state=state, impl=impl, guidance_scale=guidance)
    with mode:
        sampler.run(image(), callback=callback, progress=False)
    assert len(calls) == program.model_calls and mode.operations > program.model_calls


def test_the_guard_against_waiting_works():
    mode = NoSynchronisation()
    with mode:
        mode.active = True
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            image().sum().item()
        with pytest.raises(AssertionError, match="_to_copy"):
            image().to("meta")


# --- States on disk ---------------------------------------------------------------------------


@pytest.mark.parametrize("solver", EVERY.values(), ids=EVERY)
@directions
@pytest.mark.parametrize("state", ["lattice", "float32", "bfloat16"])
def test_resumed_from_any_position(tmp_path, solver, direction, state):
    program = solver(schedule(6), direction=direction)
    options = {"guidance_scale": 3.0, "state": state}
    path = tmp_path / "state.safetensors"
    saved = []

    def save(index, update, current):
        current.save(tmp_path / f"{index}")
        saved.append(index)

    end = Sampler(Network(), program, **options).run(image(), callback=save)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(map(str, saved))
    for index in saved[:-1]:
        network = Network()
        middle = State.load(tmp_path / f"{index}")
        assert middle.position == index + 1
        again = Sampler(network, program, **options).run(middle)
        assert same_bits(again, end)
        left = sum(len(u.stages) for u in program.updates[index + 1 :])
        assert len(network.calls) == left
    end.save(path)
    loaded = State.load(path)
    assert same_bits(loaded, end)
    for field in dataclasses.fields(State):
        if field.name not in ("tracks", "buffers"):
            assert getattr(loaded, field.name) == getattr(end, field.name)
    assert torch.equal(loaded.sample(), end.sample())
    # a finished state saved by the last callback is the end, output and all
    if program.reversible:
        inverse = Sampler(Network(), program.inverse(), **options)
        assert same_bits(inverse.run(loaded), inverse.run(end))


def test_exact_in_another_process(tmp_path):
    program = SOLVERS["edict"](schedule(), direction="invert")
    sampler = Sampler(Network(), program, guidance_scale=3.0)
    sampler.run(image()).save(tmp_path / "state")
    script = f"""
import hashlib, json
from inpo_fast import Sampler, State, edict
from tests.test_sampler import Network, schedule
program = edict(schedule(), direction="invert")
back = Sampler(Network(), program.inverse(), guidance_scale=3.0).run(
    State.load({str(tmp_path / "state")!r}))
print(json.dumps(hashlib.sha256(back.tracks[back.output].numpy().tobytes()).hexdigest()))
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    start = sampler.start(image())
    expected = hashlib.sha256(start.tracks[0].numpy().tobytes()).hexdigest()
    assert json.loads(result.stdout) == expected


# safetensors has an error of its own
@pytest.mark.parametrize("error", [OSError("disk full"), SafetensorError("disk full")])
def test_saving_replaces_the_file_or_leaves_it(tmp_path, monkeypatch, error):
    sampler = Sampler(Network(), bdia(schedule(3)))
    path = tmp_path / "state"
    sampler.start(image(0)).save(path)
    sampler.start(image(1)).save(str(path))
    assert same_bits(State.load(path), sampler.start(image(1)))

    def fail(tensors, file, metadata):
        with open(file, "wb") as partial:
            partial.write(b"half a")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        sampler.start(image(2)).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert same_bits(State.load(path), sampler.start(image(1)))
    with pytest.raises(FileNotFoundError):
        sampler.start(image(2)).save(tmp_path / "missing" / "state")


def test_files_that_are_no_states(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file at"):
        State.load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no file at"):
        State.load(tmp_path)

    good = tmp_path / "good"
    Sampler(Network(), SOLVERS["bdia-15/16"](schedule(3))).run(image()).save(good)
    data = good.read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(ValueError, match="cut is not a readable safetensors file"):
            State.load(tmp_path / "cut")
    (tmp_path / "text").write_text("not a tensor in sight, only words and more words")
    with pytest.raises(ValueError, match="text is not a readable safetensors file"):
        State.load(tmp_path / "text")
    save_file({"weight": torch.ones(3)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="foreign is not an inpo_fast state: format must be"):
        State.load(tmp_path / "foreign")


def altered(path, good, tensors=(), **fields):
    """The state file `good` with some tensors and header fields replaced, or left out by None."""
    from safetensors import safe_open

    with safe_open(good, "pt") as file:
        header = dict(file.metadata())
    content = {**load_file(good), **dict(tensors)}
    header = {k: v for k, v in {**header, **fields}.items() if v is not None}
    content = {k: v for k, v in content.items() if v is not None}
    save_file(content, path, metadata=header)
    return path


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        ({}, {"format": "inpo_fast.state/999"}, "format must be"),
        ({}, {"program": None}, "damaged header"),
        ({}, {"position": "one"}, "damaged header"),
        ({}, {"position": "-1"}, "damaged header"),
        ({}, {"scales": "0x1p0"}, "damaged header"),
        ({}, {"scales": "nan 0x1p0"}, "damaged header"),
        ({}, {"output": "2"}, "lacks a track"),
        ({}, {"scales": "0x1p0 -"}, "lacks a track that its header names"),
        ({"track0": None}, {}, "lacks a track that its header names"),
        ({"track0": torch.ones(SHAPE)}, {}, "holds tracks of dtype torch.float32"),
        ({"track1": torch.ones(SHAPE, dtype=torch.int64)}, {}, "holds tracks of dtype"),
        ({"track0": torch.ones(2, dtype=torch.int32)}, {}, "tracks of different shapes"),
        ({"buffer0": torch.ones(2, dtype=torch.int64)}, {}, "tracks of different shapes"),
        ({"buffer0": torch.ones(SHAPE, dtype=torch.int32)}, {}, "buffer that is not int64"),
        ({"buffer1": -torch.ones(SHAPE, dtype=torch.int64)}, {}, "at least 0"),
    ],
)
def test_damaged_states(tmp_path, tensors, fields, message):
    good = tmp_path / "good"
    Sampler(Network(), SOLVERS["bdia-15/16"](schedule(3))).run(image()).save(good)
    assert same_bits(State.load(altered(tmp_path / "same", good)), State.load(good))
    bad = altered(tmp_path / "bad", good, tensors, **fields)
    with pytest.raises(ValueError, match=f"bad .*{message}"):
        State.load(bad)


def test_states_of_other_programs():
    middle = Sampler(Network(), bdia(schedule(6))).run(image())
    for program in (
        # finished already
        bdia(schedule(6)),
        bdia(schedule(7)),
        bdia(schedule(6), direction="invert"),
        bdia(schedule(6), gamma=0.94).inverse(),
        bdia(schedule(6, prediction_type="v_prediction")).inverse(),
        obelm(schedule(6)).inverse(),
    ):
        with pytest.raises(ValueError, match="the state belongs to another program"):
            Sampler(Network(), program).run(middle)
    with pytest.raises(ValueError, match="the state has frac_bits 20, the sampler 16"):
        Sampler(Network(), bdia(schedule(6)).inverse(), frac_bits=16).run(middle)
    with pytest.raises(ValueError, match="the state has frac_bits 20, the sampler None"):
        Sampler(Network(), bdia(schedule(6)).inverse(), state="float32").run(middle)
    floating = Sampler(Network(), bdia(schedule(6)), state="float32").run(image())
    with pytest.raises(ValueError, match=r"the state is torch\.float32, the sampler's is float16"):
        Sampler(Network(), bdia(schedule(6)).inverse(), state="float16").run(floating)
    with pytest.raises(ValueError, match="starts from both tracks: run it on a State"):
        Sampler(Network(), bdia(schedule(6)).inverse()).run(image())


def test_an_unfinished_run_is_not_taken_for_a_finished_one(tmp_path):
    program = bdia(schedule(6))

    def save(index, update, state):
        state.save(tmp_path / f"{index}")

    Sampler(Network(), program).run(image(), callback=save)
    with pytest.raises(ValueError, match=r"left by .* at update 3"):
        Sampler(Network(), program.inverse()).run(State.load(tmp_path / "2"))
    start = Sampler(Network(), program).start(image())
    with pytest.raises(ValueError, match="at update 0"):
        Sampler(Network(), program.inverse()).run(start)
    Sampler(Network(), program.inverse()).run(State.load(tmp_path / "5"))


def test_equal_states():
    sampler = Sampler(Network(), edict(schedule(3)))
    start, end = sampler.start(image()), sampler.run(image())
    assert start.equal(start) and end.equal(end) and not start.equal(end)
    assert start.equal(sampler.start(image().clone()))
    track = start.tracks[0].clone()
    track[0, 0, 0, 0] += 1
    assert not start.equal(dataclasses.replace(start, tracks=(track, None)))
    buffer = torch.ones(SHAPE, dtype=torch.int64)
    assert not start.equal(dataclasses.replace(start, buffers=(buffer, None)))
    assert not start.equal(dataclasses.replace(start, frac_bits=19))
    floating = Sampler(Network(), edict(schedule(3)), state="float32").start(image())
    assert not start.equal(floating) and not floating.equal(start)


# --- Errors -----------------------------------------------------------------------------------


def failing(step, value):
    """A model whose output at call `step` holds `value` in one place."""
    calls = []

    def model(x, t):
        output = Network()(x, t)
        if len(calls) == step:
            output[0, 1, 2, 3] = value
        calls.append(t)
        return output

    return model


@pytest.mark.parametrize("state", ["lattice", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("step", [0, 4, 9])
def test_a_model_that_returns_no_number(tmp_path, state, value, step):
    program = bdia(schedule())
    sample = image()
    timestep = program.updates[step].timestep
    saved = []

    def save(index, update, current):
        # a state is not written once the run has gone wrong
        if index < step:
            current.save(tmp_path / f"{index}")
            saved.append(f"{index}")
        else:
            with pytest.raises(NonFiniteError, match=f"update {step}: "):
                current.save(tmp_path / f"{index}")

    dtype = torch.float64 if state == "float64" else torch.float32
    sampler = Sampler(failing(step, value), program, state=state, model_dtype=dtype)
    message = rf"update {step} of 10 \(timestep {timestep}\) of bdia\(gamma=1\), amplification"
    with pytest.raises(NonFiniteError, match=message) as caught:
        sampler.run(sample, callback=save)
    assert caught.value.update == step
    assert torch.equal(sample, image())
    assert sorted(p.name for p in tmp_path.iterdir()) == saved


def test_a_copy_of_a_moment_knows_nothing_of_what_goes_wrong_later(tmp_path):
    kept = []
    sampler = Sampler(failing(3, torch.nan), bdia(schedule()))
    with pytest.raises(NonFiniteError, match="update 3 of"):
        sampler.run(image(), callback=lambda index, update, state: kept.append(state.clone()))
    for state in kept[:3]:
        state.save(tmp_path / "state.safetensors")
    assert Sampler(Network(), bdia(schedule())).run(kept[2]).position == 10
    for state in kept[3:]:
        with pytest.raises(NonFiniteError):
            state.save(tmp_path / "state.safetensors")


def test_a_state_that_lost_its_buffers_is_refused():
    program = edict(schedule())
    state = Sampler(Network(), program).run(image())
    for buffers in ((None, None), (state.buffers[0], None)):
        with pytest.raises(ValueError, match=r"the state lacks the information buffers .* edict"):
            Sampler(Network(), program.inverse()).run(dataclasses.replace(state, buffers=buffers))


@pytest.mark.parametrize("step", [0, 5])
def test_a_state_survives_a_run_that_fails(step):
    program = edict(schedule())
    middle = Sampler(Network(), program).run(image())
    copies = [t.clone() for t in (*middle.tracks, *middle.buffers)]
    with pytest.raises(NonFiniteError):
        Sampler(failing(step, torch.nan), program.inverse()).run(middle)
    assert all(map(torch.equal, copies, (*middle.tracks, *middle.buffers)))
    back = Sampler(Network(), program.inverse()).run(middle)
    assert back.equal(Sampler(Network(), program).start(image()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_sample_that_is_no_number(value):
    sample = image()
    sample[0, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match=r"encoding the sample: .* NaN or infinite"):
        Sampler(Network(), bdia(schedule())).run(sample)
    with pytest.raises(NonFiniteError, match="update 0 of 10"):
        Sampler(Network(), bdia(schedule()), state="float32").run(sample)


def test_leaving_the_lattice():
    program = bdia(schedule())
    message = (
        rf"update 4 of 10 \(timestep {program.updates[4].timestep}\) of bdia\(gamma=1\), "
        rf"amplification {program.amplification:.3g}: the state left the range of the lattice"
    )
    with pytest.raises(LatticeRangeError, match=message) as caught:
        Sampler(failing(4, 1e6), program).run(image())
    assert caught.value.update == 4
    with pytest.raises(LatticeRangeError, match="encoding the sample"):
        Sampler(Network(), program).run(image() * 1e4)
    # a float state holds it
    assert Sampler(failing(4, 1e6), program, state="float32").run(image()).sample().isfinite().all()


def test_amplification_leaves_the_lattice_and_says_so():
    with pytest.warns(AmplificationWarning):
        program = bdia(schedule(40), gamma=0.5, direction="invert")
    with pytest.raises(LatticeRangeError, match=r"amplification \d(\.\d+)?e\+1\d"):
        Sampler(Network(), program).run(image())


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda x: x[:1], ValueError, r"shape \(3, 4, 5, 7\), got \(1, 4, 5, 7\)"),
        (lambda x: x.sum(), ValueError, r"model must return a tensor of shape .* got \(\)"),
        (lambda x: (x,), TypeError, "model must return a tensor, got tuple"),
        (lambda x: None, TypeError, "model must return a tensor, got NoneType"),
        (lambda x: x.double(), TypeError, "model must return one of .* got torch.float64"),
        (lambda x: x.long(), TypeError, "model must return one of .* got torch.int64"),
        (lambda x: x.to(torch.complex64), TypeError, "model must return one of .* got torch.com"),
    ],
)
@pytest.mark.parametrize("state", ["lattice", "float32"])
def test_models_that_return_something_else(output, error, message, state):
    with pytest.raises(error, match=message):
        Sampler(lambda x, t: output(x), bdia(schedule()), state=state).run(image())


def test_a_float64_state_takes_any_floating_model():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        sampler = Sampler(Network(), bdia(schedule()), state="float64", model_dtype=dtype)
        assert sampler.run(image()).sample().dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be callable, got int"),
        ({"program": "ddim"}, TypeError, "program must be a Program, got str"),
        ({"state": "float8"}, ValueError, "state must be 'lattice' or one of .* got 'float8'"),
        ({"model_dtype": torch.int32}, ValueError, "model_dtype must be a floating dtype"),
        ({"model_dtype": torch.float64}, ValueError, "takes model outputs up to float32"),
        ({"frac_bits": 0}, ValueError, "frac_bits must be in"),
        ({"frac_bits": 31}, ValueError, "frac_bits must be in"),
        ({"impl": "cuda"}, ValueError, "impl must be one of .* got 'cuda'"),
        ({"guidance_scale": torch.nan}, ValueError, "guidance_scale must be finite"),
        ({"guidance_scale": [[1.0]]}, ValueError, "guidance_scale must be finite numbers, one or"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    good = {"model": Network(), "program": bdia(schedule())}
    with pytest.raises(error, match=message):
        Sampler(**{**good, **arguments})


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (torch.ones(SHAPE, dtype=torch.int32), TypeError, "a floating tensor, got torch.int32"),
        (np.ones(SHAPE), TypeError, "sample must be a floating tensor, got float64"),
        (torch.tensor(1.0), ValueError, r"sample must be \[B, …\]"),
        (None, TypeError, "sample must be a floating tensor"),
    ],
)
def test_wrong_samples(sample, error, message):
    with pytest.raises(error, match=message):
        Sampler(Network(), bdia(schedule())).run(sample)


@pytest.mark.parametrize("guidance", [[2.0], [2.0, 3.0], [1.0, 1.0], [2.0] * 4])
def test_guidance_for_another_batch(guidance):
    with pytest.raises(ValueError, match=rf"{len(guidance)} values for a batch of 3"):
        Sampler(Network(), bdia(schedule()), guidance_scale=guidance).run(image())


def test_a_program_that_would_overflow_its_buffer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AmplificationWarning)
        program = bdia(schedule(100), gamma=0.5)
        message = (
            "over 100 model calls needs an information buffer of 50 bits and the lattice has 46"
        )
        with pytest.raises(ValueError, match=message):
            Sampler(Network(), program)
        Sampler(Network(), program, state="float32")
        Sampler(Network(), bdia(schedule(90), gamma=0.5))


def test_the_sampler_does_not_warn_of_a_program_it_does_not_run():
    program = bdia(schedule(50), gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sampler(Network(), program).run(image())


def test_an_update_that_starts_a_track_forgets_its_buffer():
    """In a program of one's own that scales a track and starts it again."""
    updates = (
        Update(0, Fraction(1, 3), 0.0),
        Update(0, Fraction(0), 1.0),
        Update(0, Fraction(2), 0.0),
    )
    program = Program("own", updates, (1.0, 1.0), input=1, output=0, order=1)
    track = torch.arange(-4, 8, dtype=torch.int32).reshape(3, 4)
    state = State(
        (track, track),
        (torch.zeros(3, 4).long(),) * 2,
        (1.0, 1.0),
        1,
        0,
        20,
        program.fingerprint,
        None,
    )
    end = Sampler(Network(), program).run(state)
    assert torch.equal(end.tracks[0], 2 * track)
    assert torch.equal(end.buffers[0], torch.zeros(3, 4, dtype=torch.int64))


# --- Compiled ---------------------------------------------------------------------------------


def test_a_compiled_model_is_exact_and_compiled_once_for_both_directions():
    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, sample, timestep):
            return torch.tanh(self.layer(sample)) * torch.cos(timestep[:, None, None, None] / 300)

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, z = Denoiser(), torch.randn(SHAPE)
    program = bdia(NoiseSchedule.from_alphas_cumprod(TABLE, 5), direction="invert")
    there = Sampler(model, program, guidance_scale=3.0, compile=True)
    back = Sampler(model, program.inverse(), guidance_scale=3.0, compile=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert back.run(there.run(z)).equal(there.start(z))
    assert counters["stats"]["unique_graphs"] == 1


def test_compile_is_checked():
    program = bdia(NoiseSchedule.from_alphas_cumprod(TABLE, 3))
    for value in ("blocks", 1):
        with pytest.raises(ValueError, match=f"compile must be False, True or .*, got {value!r}"):
            Sampler(lambda sample, timestep: sample, program, compile=value)
    with pytest.raises(TypeError, match=r"frac_bits must be an int, got 20\.0"):
        Sampler(lambda sample, timestep: sample, program, frac_bits=20.0)
    sampler = Sampler(lambda sample, timestep: sample, program, compile="graph")
    with pytest.raises(ValueError, match="compile='graph' captures CUDA graphs and needs a GPU"):
        sampler.run(torch.randn(SHAPE))


@pytest.mark.parametrize("compile", [False, True])
def test_threads_that_share_a_sampler(compile, monkeypatch):
    """A compiled sampler runs for one thread at a time, any other for all of them at once."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    inside, most = set(), []
    met = threading.Barrier(2)

    def model(sample, timestep):
        inside.add(threading.get_ident())
        most.append(len(inside))
        if not compile:
            met.wait(timeout=60)
        return torch.tanh(sample)

    program = bdia(NoiseSchedule.from_alphas_cumprod(TABLE, 4), direction="invert")
    sampler = Sampler(model, program, compile=compile)
    samples, ends = torch.randn(2, *SHAPE), [None, None]
    taken = threading.Barrier(2)

    def left(index, update, state):
        if index == len(program.updates) - 1:
            inside.discard(threading.get_ident())
        # every chance for the other thread to come in between
        time.sleep(0.01)

    def run(k):
        taken.wait(timeout=60)
        ends[k] = sampler.run(samples[k], callback=left)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == (1 if compile else 2)
    for sample, end in zip(samples, ends, strict=True):
        alone = Sampler(lambda z, t: torch.tanh(z), program).run(sample)
        assert end.equal(alone)


@pytest.mark.parametrize("compile", [False, "graph"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_sampler_is_copied_and_pickled(copied, compile):
    sampler = Sampler(Network(), bdia(schedule(3)), compile=compile)
    again = copied(sampler)
    if compile is False:
        assert again.run(image()).equal(sampler.run(image()))
    # with a turn of its own
    with sampler._turn, again._turn, pytest.raises(RuntimeError, match="its own callback"):
        again._turn.__enter__()


def test_a_compiled_sampler_is_not_run_from_within(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    program = bdia(NoiseSchedule.from_alphas_cumprod(TABLE, 2), direction="invert")
    z = torch.randn(SHAPE)
    sampler = Sampler(lambda sample, timestep: torch.tanh(sample), program, compile=True)
    with pytest.raises(RuntimeError, match="cannot be run by its own callback or model: make"):
        sampler.run(z, callback=lambda *_: sampler.run(z))
    # and can be run afterwards
    plain = Sampler(lambda sample, timestep: torch.tanh(sample), program)
    expected = plain.run(z, callback=lambda *_: plain.run(z))
    assert sampler.run(z).equal(expected)


def test_the_settings_of_a_run_are_shared_by_threads_and_restored():
    import torch._inductor.config as inductor

    cudnn = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.deterministic, inductor.deterministic)
    cudnn.benchmark = True
    entered, leave, seen = threading.Event(), threading.Event(), []

    def waiting(sample, timestep):
        entered.set()
        leave.wait()
        seen.append((cudnn.benchmark, cudnn.deterministic, inductor.deterministic))
        return sample

    program = bdia(NoiseSchedule.from_alphas_cumprod(TABLE, 1))
    thread = threading.Thread(target=Sampler(waiting, program).run, args=(torch.randn(SHAPE),))
    try:
        thread.start()
        entered.wait()
        # a run that begins and ends meanwhile must not restore what the other one needs
        Sampler(lambda sample, timestep: sample, program).run(torch.randn(SHAPE))
        leave.set()
        thread.join()
        assert seen == [(False, True, True)]
        assert (cudnn.benchmark, cudnn.deterministic, inductor.deterministic) == (
            True,
            *before[1:],
        )
    finally:
        leave.set()
        cudnn.benchmark = before[0]


def test_a_run_sets_what_has_been_imported_since_another_one_began(monkeypatch):
    import torch._inductor.config as inductor

    before, seen = inductor.deterministic, []
    program = bdia(NoiseSchedule.from_alphas_cumprod(TABLE, 1))

    def importing(sample, timestep):
        monkeypatch.undo()
        Sampler(lambda x, t: seen.append(inductor.deterministic) or x, program).run(sample)
        return sample

    monkeypatch.delitem(sys.modules, "torch._inductor.config")
    Sampler(importing, program).run(torch.randn(SHAPE))
    assert seen == [True]
    assert inductor.deterministic is before is False


def test_running_out_of_memory_leaves_the_callers_tensors_alone():
    calls = []

    def failing(sample, timestep):
        calls.append(timestep)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("simulated")
        return torch.tanh(sample)

    program = bdia(NoiseSchedule.from_alphas_cumprod(TABLE, 5), direction="invert")
    sampler, z = Sampler(failing, program), torch.randn(SHAPE)
    start = sampler.start(z)
    before, kept = z.clone(), start.clone()
    for initial in (z, start):
        calls.clear()
        with pytest.raises(torch.OutOfMemoryError):
            sampler.run(initial)
    assert torch.equal(z, before)
    assert start.equal(kept)
    sampler.run(start)


@pytest.mark.parametrize(
    ("shape", "device"), [((1, *SHAPE[1:]), "cpu"), (SHAPE, "meta")], ids=["shape", "device"]
)
def test_captured_graphs_take_what_they_were_captured_for(monkeypatch, shape, device):
    """They are bound to memory: a copy into it must not be broadcast, and they stay as they are."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    program = bdia(NoiseSchedule.from_alphas_cumprod(TABLE, 2), direction="invert")
    sampler = Sampler(lambda sample, timestep: torch.tanh(sample), program, compile=True)
    bound = SimpleNamespace(tracks=[torch.empty(shape, dtype=torch.int32, device=device)])
    sampler._graphs = bound
    z = torch.randn(SHAPE)
    before = z.clone()
    message = rf"bound to its first batch, {re.escape(str(shape))} on {device}, got .* on cpu; make"
    with pytest.raises(ValueError, match=message):
        sampler.run(z)
    assert sampler._graphs is bound and torch.equal(z, before)


def test_a_model_on_another_device_is_refused():
    program = bdia(NoiseSchedule.from_alphas_cumprod(TABLE, 2))
    z = torch.randn(SHAPE)
    before = z.clone()
    with pytest.raises(ValueError, match="m1 must be on the device of z, cpu, got meta"):
        Sampler(lambda sample, timestep: sample.to("meta"), program).run(z)
    assert torch.equal(z, before)
