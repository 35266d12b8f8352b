"""The compiled loop: CUDA graphs give the bits of the eager loop, also in another process."""

import json
import threading

import pytest
import torch

from inpo_fast import NoiseSchedule, Sampler, State, bdia, edict, mccallum_foster, obelm
from inpo_fast.schedule import scaled_linear_alphas_cumprod
from tests.gpu.processes import run_anew

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SOLVERS = {
    "bdia": bdia,
    "bdia(15/16)": lambda schedule, **k: bdia(schedule, gamma=15 / 16, **k),
    "edict": edict,
    "obelm": obelm,
    "bdia(heun)": lambda schedule, **k: bdia(schedule, integrator="heun", **k),
    "mccallum-foster(2s)": lambda schedule, **k: mccallum_foster(
        schedule, integrator="dpm++2s", **k
    ),
}


class Denoiser(torch.nn.Module):
    """A small network with a normalisation, whose sums Inductor is free to order."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(4, 64, 3, padding=1)
        self.norm = torch.nn.GroupNorm(8, 64)
        self.last = torch.nn.Conv2d(64, 4, 3, padding=1)

    def forward(self, sample, timestep):
        hidden = self.norm(self.first(sample)) * torch.cos(timestep[:, None, None, None] / 300)
        return self.last(torch.nn.functional.silu(hidden).to(sample.dtype)).to(sample.dtype)


def denoiser(dtype):
    torch.manual_seed(0)
    return Denoiser().to("cuda", dtype)


def schedule(steps=10):
    return NoiseSchedule.from_alphas_cumprod(scaled_linear_alphas_cumprod(), steps)


def latents(batch=2):
    return torch.randn(batch, 4, 32, 32, generator=torch.Generator().manual_seed(1)).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("compile", [True, "graph"])
def test_round_trips_are_exact(name, dtype, compile):
    model, z = denoiser(dtype), latents()
    program = SOLVERS[name](schedule(), direction="invert")
    options = {"model_dtype": dtype, "guidance_scale": 3.0, "compile": compile}
    there = Sampler(model, program, **options)
    back = Sampler(model, program.inverse(), **options)
    noise = there.run(z)
    again = back.run(noise)
    assert again.equal(there.start(z))
    # replays of captured graphs, in both directions
    assert there.run(z).equal(noise)
    assert back.run(noise).equal(again)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("state", ["lattice", "float32"])
def test_graphs_give_the_bits_of_the_eager_loop(name, state):
    model, z = denoiser(torch.bfloat16), latents()
    program = SOLVERS[name](schedule(), direction="invert")
    for guidance in (1.0, 3.0, [1.5, 7.5]):
        options = {"model_dtype": torch.bfloat16, "guidance_scale": guidance, "state": state}
        eager = Sampler(model, program, **options).run(z)
        graph = Sampler(model, program, compile="graph", **options).run(z)
        assert graph.equal(eager)


def test_a_run_continues_from_its_middle():
    model, z, middle = denoiser(torch.float16), latents(), []
    program = edict(schedule(), direction="invert")
    sampler = Sampler(model, program, model_dtype=torch.float16, compile="graph")

    def keep(index, update, state):
        if index == 11:
            middle.append(state.clone())

    whole = sampler.run(z, callback=keep)
    assert sampler.run(middle[0]).equal(whole)


@pytest.mark.parametrize("shared", [True, False])
def test_threads_capture_and_replay_one_after_the_other(shared):
    """One sampler for both threads, or one each, captured in the same moment."""
    model, program = denoiser(torch.float32), bdia(schedule(), direction="invert")
    samples = [latents(), latents().flip(0)]
    samplers = [Sampler(model, program, compile="graph") for _ in samples]
    both, ends = threading.Barrier(2), [[], []]

    def run(k):
        both.wait(timeout=60)
        # the first captures, the others replay
        ends[k] = [samplers[0 if shared else k].run(samples[k]) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for z, found in zip(samples, ends, strict=True):
        expected = Sampler(model, program).run(z)
        assert len(found) == 3 and all(end.equal(expected) for end in found)


def test_nothing_in_the_loop_waits_for_the_device():
    model, z = denoiser(torch.bfloat16), latents()
    program = bdia(schedule(), direction="invert")
    for compile in (False, "graph"):
        sampler = Sampler(model, program, model_dtype=torch.bfloat16, compile=compile)
        sampler.run(z)
        last = len(program.updates) - 1

        def strict(index, update, state, last=last):
            torch.cuda.set_sync_debug_mode("default" if index == last else "error")

        try:
            sampler.run(z, callback=strict)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_another_shape_is_refused():
    sampler = Sampler(denoiser(torch.float32), bdia(schedule()), compile="graph")
    sampler.run(latents(2))
    with pytest.raises(ValueError, match=r"bound to its first batch, \(2, 4, 32, 32\)"):
        sampler.run(latents(3))
    sampler.run(latents(2))


def test_running_out_of_memory_leaves_everything_usable():
    model, z = denoiser(torch.float32), latents()
    fail = [True]

    def failing(sample, timestep):
        if fail[0]:
            torch.empty(2**60, dtype=torch.uint8, device="cuda")
        return model(sample, timestep)

    before = z.clone()
    for compile in (False, "graph"):
        sampler = Sampler(failing, bdia(schedule()), compile=compile)
        fail[0] = True
        with pytest.raises(torch.OutOfMemoryError):
            sampler.run(z)
        assert torch.equal(z, before)
        fail[0] = False
        assert sampler.run(z).equal(Sampler(model, bdia(schedule())).run(z))


def test_a_capture_that_failed_holds_no_memory():
    def waits(sample, timestep):
        return sample * sample.sum().item()

    with pytest.raises(RuntimeError):
        Sampler(waits, bdia(schedule()), compile="graph").run(latents())
    given = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    reserved = torch.cuda.memory_reserved()
    del given
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - 2**28
    z = latents()
    model = denoiser(torch.float32)
    graph = Sampler(model, bdia(schedule()), compile="graph").run(z)
    assert graph.equal(Sampler(model, bdia(schedule())).run(z))


def test_a_run_on_another_stream_waits_until_the_last_one_is_read():
    model, program = denoiser(torch.float32), bdia(schedule())
    sampler, samples = Sampler(model, program, compile="graph"), [latents(), latents().flip(0)]
    expected = [sampler.run(z) for z in samples]
    streams = [torch.cuda.Stream() for _ in samples]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for z, stream in zip(samples, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(sampler.run(z))
    torch.cuda.synchronize()
    assert all(end.equal(expected[k % 2]) for k, end in enumerate(found))


def test_one_graph_for_each_kind_of_update():
    sampler = Sampler(denoiser(torch.float32), bdia(schedule(20)), compile="graph")
    sampler.run(latents())
    # the DDIM start, and the two tracks in turn
    assert len(sampler._graphs._graphs) == 3


def test_another_process_decodes_to_the_same_bits(tmp_path):
    program = """
import json, sys, torch
from tests.gpu.test_loop import denoiser, latents, schedule
from inpo_fast import Sampler, State, bdia
path, direction = sys.argv[1:]
model = denoiser(torch.bfloat16)
program = bdia(schedule(), direction="invert")
options = dict(model_dtype=torch.bfloat16, guidance_scale=3.0, compile=True)
if direction == "there":
    Sampler(model, program, **options).run(latents()).save(path)
else:
    sampler = Sampler(model, program.inverse(), **options)
    state = sampler.run(State.load(path, device="cuda"))
    start = Sampler(model, program, **options).start(latents())
    print(json.dumps(state.equal(start)))
"""
    path = tmp_path / "noise.safetensors"
    run_anew(program, path, "there", caches=tmp_path / "there")
    printed = run_anew(program, path, "back", caches=tmp_path / "back")
    assert json.loads(printed.splitlines()[-1])
    assert State.load(path).frac_bits == 20
