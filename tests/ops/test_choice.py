"""The choice of a backend, with GPUs and packages that are not there."""

import importlib.util
import warnings

import pytest
import torch

from inpo_fast import ops
from inpo_fast.ops import choice, native, registration
from inpo_fast.ops.registration import REFERENCE, SCHEMAS

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Nothing found out before or during a test is remembered."""
    monkeypatch.setattr(choice, "DEFAULT_IMPL", "auto")
    monkeypatch.setattr(choice, "_automatic", {})
    monkeypatch.setattr(choice, "_resolved", {})
    choice.triton_problem.cache_clear()
    yield
    choice.triton_problem.cache_clear()


class FakeTriton:
    """Stands for ``inpo_fast.ops.triton``."""

    VERSION, INTERPRETED = "9.9", False

    def __init__(self, error=None):
        self.error, self.probes, self.probed = error, 0, None

    def probe(self, device):
        self.probes += 1
        self.probed = device
        if self.error is not None:
            raise self.error


@pytest.fixture
def machine(monkeypatch):
    """Pretend a GPU, a build of the extension, and an installed triton."""

    def pretend(capability=(9, 0), devices=("cpu",), architectures=(), triton=None):
        triton = triton or FakeTriton()
        monkeypatch.setattr(native, "MISSING", "" if devices else "it is not built")
        monkeypatch.setattr(native, "DEVICES", devices)
        monkeypatch.setattr(native, "ARCHITECTURES", architectures)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(choice, "triton_module", lambda: triton)
        return triton

    return pretend


def refusal(impl, device):
    with pytest.raises(ValueError, match=f"impl='{impl}' is not available: ") as caught:
        choice.resolve(impl, device)
    return str(caught.value).partition(": ")[2]


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 6), True),
        (["sm_80"], (9, 0), False),
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_90"], (10, 0), False),
        (["sm_80", "compute_80"], (9, 0), True),
        (["sm_90", "compute_90"], (8, 0), False),
        (["sm_100"], (10, 0), True),
        (["sm_100"], (1, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a", "compute_100a"], (10, 3), False),
        ([], (9, 0), False),
    ],
)
def test_auto_takes_native_kernels_that_were_built_for_the_gpu(
    machine, architectures, capability, runs
):
    machine(capability, ("cpu", "cuda"), tuple(architectures))
    chosen = "native" if runs else "triton" if capability >= (8, 0) else "reference"
    assert choice.resolve("auto", GPU) == chosen
    if runs:
        assert choice.resolve("native", GPU) == "native"
    else:
        said = refusal("native", GPU)
        assert f"cuda:0 has compute capability {capability[0]}.{capability[1]}" in said
        assert "rebuild" in said and all(name in said for name in architectures)


def test_auto_takes_triton_where_there_are_no_native_kernels(machine):
    triton = machine()
    assert choice.resolve("auto", GPU) == "triton" == choice.resolve("triton", GPU)
    assert choice.resolve("auto", torch.device("cuda", 1)) == "triton"
    assert choice.resolve("auto", CPU) == "native"
    assert triton.probes == 1
    said = refusal("native", GPU)
    assert said == "it has kernels for cpu only, got tensors on cuda:0"


def test_the_probe_is_for_cuda_tensors_only(machine):
    triton = machine()
    assert choice.resolve("auto", CPU) == "native"
    assert choice.resolve("reference", GPU) == "reference"
    assert triton.probes == 0


def test_a_triton_that_does_not_work_is_reported_once(machine):
    machine(triton=FakeTriton(RuntimeError("no C compiler\nlong output")))
    with pytest.warns(RuntimeWarning, match="launch a kernel: RuntimeError: no C compiler. The op"):
        assert choice.resolve("auto", GPU) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.resolve("auto", torch.device("cuda", 1)) == "reference"
        assert "RuntimeError: no C compiler" in refusal("triton", GPU)


def test_an_old_gpu(machine):
    machine((7, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.resolve("auto", GPU) == "reference"
    assert refusal("triton", GPU) == ("it needs compute capability 8.0 or higher, the GPU has 7.5")


@pytest.mark.parametrize("new", [0, 1])
def test_an_old_gpu_beside_a_new_one(machine, monkeypatch, new):
    """Whichever of them is the current device, the first one."""
    triton = machine()
    capabilities = {new: (9, 0), 1 - new: (7, 0)}
    capabilities[None] = capabilities[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def capability(device=None):
        return capabilities[getattr(device, "index", device)]

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    able, old = torch.device("cuda", new), torch.device("cuda", 1 - new)
    assert choice.resolve("auto", able) == "triton" == choice.resolve("triton", able)
    assert triton.probed == able and ops.backends()["triton"].available
    assert choice.resolve("auto", old) == "reference"
    assert refusal("triton", old).endswith(f"{old} has 7.0")


def test_no_gpu(machine):
    machine(None)
    assert refusal("triton", CPU) == "there is no CUDA GPU, or this torch is built without CUDA"
    assert not ops.backends()["triton"].available


def test_no_triton(machine, monkeypatch):
    machine()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choice.resolve("auto", GPU) == "reference"
    assert 'pip install "inpo-fast[triton]"' in refusal("triton", GPU)


def test_no_extension(machine):
    machine(devices=())
    assert choice.resolve("auto", CPU) == "reference"
    assert refusal("native", CPU) == "it is not built" == refusal("native", GPU)


def test_triton_runs_cuda_tensors_only_unless_interpreted(machine):
    triton = machine()
    assert refusal("triton", CPU).startswith("it runs on CUDA tensors, got tensors on cpu (TRITON_")
    triton.INTERPRETED = True
    assert choice.resolve("triton", CPU) == "triton"
    assert refusal("triton", torch.device("meta"))


def test_the_environment_variable_is_a_name_like_impl(machine, monkeypatch):
    machine()
    monkeypatch.setattr(choice, "DEFAULT_IMPL", "native")
    with pytest.raises(ValueError, match=r"INPO_FAST_IMPL='native' is not available: .* cpu only"):
        choice.resolve("auto", GPU)
    assert choice.resolve("triton", GPU) == "triton"


def test_backends_say_what_they_are(machine):
    machine(devices=("cpu", "cuda"), architectures=("sm_80", "sm_90"))
    found = ops.backends()
    assert all(backend.available for backend in found.values())
    assert found["native"].reason == "inpo_fast._C for cpu, cuda (sm_80, sm_90)"
    assert found["triton"].reason == "triton 9.9 on CUDA GPUs"


@pytest.mark.skipif("cuda" in native.DEVICES, reason="the extension has CUDA kernels")
def test_the_dispatcher_reaches_triton_where_there_are_no_native_kernels(machine, monkeypatch):
    """``torch.ops.inpo_fast`` on CUDA tensors: registered, and chosen at the call."""
    triton = machine()
    for name in SCHEMAS:
        operator = f"{registration.NAMESPACE}::{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")
    triton.lattice_encode = lambda *args: args
    monkeypatch.setattr(registration, "triton_module", lambda: triton)
    kernel = registration._cuda_kernel("lattice_encode")
    x = torch.ones(2, 3)
    arguments = [x, torch.ones(()), 20, ops.new_status(1)[0]]
    choice._automatic[x.device] = "triton"
    assert kernel(*arguments) == tuple(arguments)
    choice._automatic[x.device] = "reference"
    assert torch.equal(kernel(*arguments), REFERENCE["lattice_encode"](*arguments))


def test_tensors_on_two_devices_are_refused():
    z = torch.zeros(2, 3, dtype=torch.int32)
    other = torch.zeros(2, 3, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="y must be on the device of z, cpu, got meta"):
        ops.lattice_update(z, other, torch.ones(4), status=ops.new_status(1)[0])
