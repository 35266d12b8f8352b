"""A compiled Triton kernel is launched again where Triton would choose it again, nowhere else."""

import pytest
import torch

triton = pytest.importorskip("triton")

from inpo_fast.ops import triton_launch as launcher  # noqa: E402

GRID, OPTIONS = (3, 1, 1), {"num_warps": 4}
F32, F16 = torch.float32, torch.float16


def launch(kernel, grid, tensors, scalars, options=OPTIONS):
    launcher.launch(kernel, grid, tensors, scalars, options)


class Compiled:
    """What Triton returns from a launch: it can be launched by itself, on a grid."""

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *args, stream: self.log.append(("again", grid, args, stream))


class Kernel:
    def __init__(self):
        self.log = []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.log.append(("chosen", grid, args, options))
            return Compiled(self.log)

        return run


class Driver:
    def get_current_stream(self, device):
        return 7


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launcher, "CompiledKernel", Compiled)
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    return Kernel()


def floats(dtype=F32, offset=0):
    return torch.zeros(64 + offset, dtype=dtype)[offset:]


def test_the_second_launch_has_the_new_pointers(kernel):
    x, y = floats(), floats()
    launch(kernel, GRID, (x, None), (64, True))
    launch(kernel, GRID, (y, None), (64, True))
    assert kernel.log == [
        ("chosen", GRID, (x, None, 64, True), OPTIONS),
        ("again", GRID, (y.data_ptr(), None, 64, True), 7),
    ]


OTHERS = {
    "kernel": (Kernel(), GRID, (floats(), None), (64,)),
    "grid": (None, (3, 2, 1), (floats(), None), (64,)),
    "dtype": (None, GRID, (floats(F16), None), (64,)),
    "alignment": (None, GRID, (floats(offset=1), None), (64,)),
    "a tensor more": (None, GRID, (floats(), floats()), (64,)),
    "scalar": (None, GRID, (floats(), None), (1,)),
    "option": (None, GRID, (floats(), None), (64,), {"num_warps": 8}),
    "options": (None, GRID, (floats(), None), (64,), {"num_stages": 4}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_triton_compiles_for_is_never_mixed_up(kernel, other):
    launch(kernel, GRID, (floats(), None), (64,))
    one, *arguments = OTHERS[other]
    one = one or kernel
    for expected in ("chosen", "again"):
        launch(one, *arguments)
        assert one.log[-1][0] == expected
    launch(kernel, GRID, (floats(), None), (64,))
    assert kernel.log[-1][0] == "again"


def test_knobs_that_compile_anew_are_heeded(kernel, monkeypatch):
    knobs = triton.knobs
    settings = [
        (knobs.runtime, "debug", not knobs.runtime.debug),
        (knobs.compilation, "instrumentation_mode", "some"),
        (knobs.runtime, "add_stages_inspection_hook", lambda: ("", "")),
    ]
    for knob, name, value in settings:
        for _ in range(2):
            launch(kernel, GRID, (floats(),), (64,))
        assert kernel.log[-1][0] == "again"
        with monkeypatch.context() as context:
            context.setattr(knob, name, value)
            launch(kernel, GRID, (floats(),), (64,))
        assert kernel.log[-1][0] == "chosen"
        kept = len(launcher._compiled)
        assert kept == (1 if name == "add_stages_inspection_hook" else 2)
        launcher._compiled.clear()


def test_what_is_not_compiled_is_not_kept(kernel, monkeypatch):
    monkeypatch.setattr(launcher, "CompiledKernel", int)  # as if the interpreter had run it
    for _ in range(2):
        launch(kernel, GRID, (floats(),), (64,))
    assert [entry[0] for entry in kernel.log] == ["chosen"] * 2


def test_the_kept_kernels_are_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launcher, "MOST_COMPILED", 4)
    for n in range(100):
        launch(kernel, GRID, (floats(),), (n,))
        assert len(launcher._compiled) <= 4
