# SPDX-License-Identifier: Apache-2.0
"""What could make the model call itself faster, tried one by one on the compiled model at batch 2.

Each lever is the call that a Sampler captures with one thing changed, in a process of its own: as
many as the memory takes compile beside each other, and are then timed in turns with the call as
shipped. A lever must stay as near to the float32 model as the shipped call, and is of use only if
the bits stay: the call repeats itself, and of those that pay, a second process that compiles from
nothing gives the same. Those whose kernels are tuned come last, one by one, as they are chosen by
their times. Other rows say where the time of a call goes, as shipped and by fused layers: the
kernels of each kind, with the rate at which the model's arithmetic of that kind is done.

Fused layers are tried without a compiler: what it would do to them, they have done.

``--only`` takes ``sd15`` and ``sdxl``, and labels of levers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import multiprocessing
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import models
from benchmarks.common import Row, captured, seconds_of_call
from inpo_fast.determinism import reproducible

Change = Callable[[nn.Module], Any]
Settings = Callable[[], contextlib.AbstractContextManager[Any]]

PAYS = 1.005
"""A gain from which on the bits of another process are looked at."""
SPREAD = 1.5
"""How much farther than the shipped call a lever may be from the float32 model: all round alike, in
other places."""
PLACE = {"sd15": 4.0, "sdxl": 10.0}
"""GiB that a process may need."""


def nothing(unet: nn.Module) -> None:
    """As the sampler does it."""


def fused(unet: nn.Module) -> None:
    """Norms and gates as Triton kernels."""
    from inpo_fast.layers import fuse_layers

    fuse_layers(unet)


def fused_qkv(unet: Any) -> None:
    """One product for the three projections of an attention."""
    unet.fuse_qkv_projections()


class Once(nn.Module):
    """A layer whose input is always the same, so that it computes only once."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.output = layer, None

    def forward(self, input: Tensor) -> Tensor:
        if self.output is None:
            self.output = self.layer(input)
        return self.output


def text_once(unet: nn.Module) -> None:
    """Fused layers and QKV, and no step computes the keys and values of the text again."""
    from diffusers.models.attention import BasicTransformerBlock

    fused_qkv(unet)
    fused(unet)
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.attn2.to_kv = Once(module.attn2.to_kv)


def compiled_blocks(unet: Any) -> None:
    """Fused layers, but for the transformer blocks, which are compiled."""
    fused(unet)
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False)


def contiguous(unet: nn.Module) -> None:
    """Channels first."""
    unet.to(memory_format=torch.contiguous_format)


def config(**values: object) -> Settings:
    """Compile with other settings of Inductor."""
    return lambda: inductor.patch(**values)


def attention(backend: SDPBackend) -> Settings:
    """Force one kernel of scaled dot product attention."""
    return lambda: sdpa_kernel([backend])


class Lever(NamedTuple):
    """A change of the model, and settings while it is compiled, if it is whole, and captured."""

    change: Change = nothing
    settings: Settings = contextlib.nullcontext
    compiled: bool = True
    tuned: bool = False
    """Whether kernels are chosen by timing them, which takes many minutes."""


SHIPPED = "as shipped"
AUTOTUNED = config(
    # products only: cuDNN's convolutions reach what the chip does
    deterministic=False,
    max_autotune_gemm=True,
    max_autotune_gemm_backends="ATEN,TRITON",
    max_autotune_conv_backends="ATEN",
)
LEVERS = {
    SHIPPED: Lever(),
    "fused QKV": Lever(fused_qkv),
    "fused layers, captured only": Lever(fused, compiled=False),
    "fused layers and QKV, captured only": Lever(
        lambda unet: (fused_qkv(unet), fused(unet)), compiled=False
    ),
    "fused layers and QKV, text once, captured only": Lever(text_once, compiled=False),
    "fused layers, compiled blocks": Lever(compiled_blocks, compiled=False),
    "cuDNN attention": Lever(settings=attention(SDPBackend.CUDNN_ATTENTION)),
    "flash attention": Lever(settings=attention(SDPBackend.FLASH_ATTENTION)),
    "freezing": Lever(settings=config(freezing=True)),
    "1x1 convolutions as products": Lever(settings=config(conv_1x1_as_mm=True)),
    "contiguous memory": Lever(contiguous),
    "coordinate descent": Lever(
        settings=config(deterministic=False, coordinate_descent_tuning=True), tuned=True
    ),
    "fused layers, blocks by max-autotune": Lever(
        compiled_blocks, AUTOTUNED, compiled=False, tuned=True
    ),
    "max-autotune": Lever(settings=AUTOTUNED, tuned=True),
}
_KINDS = {
    # the first whose pattern is in a kernel's name, and in those of the operators whose arithmetic
    # it does; a product that Inductor chose (triton_tem) is named after all that follows in it, too
    "norms, activations, casts": (
        "triton_(poi|red|per)|elementwise|^(?!triton_tem).*_norm|geglu|biased_sum",
        "(?!)",
    ),
    "attention": ("^(?!triton_tem).*(flash|fmha|sdpa)", "scaled_dot_product"),
    "convolutions": ("^(?!triton_tem).*(conv|fprop|implicit)", "convolution"),
    "matrix products": ("gemm|nvjet|cutlass|splitk|triton_tem", "mm"),
    "other": ("", ""),
}


def rows(device: str, quick: bool, only: Sequence[str]) -> Iterator[Row]:
    """Yield rows of every lever, or those named, for both models, or the one that is named."""
    if unknown := set(only) - {*PLACE, *LEVERS}:
        known = ", ".join((*PLACE, *LEVERS))
        raise SystemExit(f"benchmarks: --only takes {known}, got {sorted(unknown)}")
    if device != "cuda":
        raise SystemExit("benchmarks: levers are tried on a GPU: --device cuda")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    rounds = 3 if quick else 9
    chosen = [label for label in LEVERS if label in only] or list(LEVERS)
    for name in [name for name in PLACE if name in only] or list(PLACE):
        # besides the shipped one and its float32 model
        together = max(1, int(memory / PLACE[name]) - 2)
        with Contender(name, SHIPPED) as shipped:
            for tuned in (False, True):
                labels = [x for x in chosen if x != SHIPPED and LEVERS[x].tuned == tuned]
                if tuned:
                    # nothing else may be at work while kernels are chosen by their times
                    shipped.wait()
                    together = 1
                paying: dict[str, Made] = {}
                for lever in compiled(name, labels, shipped, together):
                    row = lever.row(*lever.against(shipped, rounds))
                    if row.ratios[SHIPPED] > PAYS:
                        paying[lever.label] = lever.made
                    yield row
                    if not LEVERS[lever.label].compiled:
                        yield from kind_rows(lever)
                if SHIPPED in chosen and not tuned:
                    yield from kind_rows(shipped)
                for twin in compiled(name, list(paying), shipped, together):
                    yield twin.bits_row(paying[twin.label])


def compiled(
    name: str, labels: Sequence[str], shipped: Contender, together: int
) -> Iterator[Contender]:
    """Yield the levers that compile, while no other does: so many at a time, which then wait."""
    for first in range(0, len(labels), together):
        several = labels[first : first + together]
        threads = max(1, len(os.sched_getaffinity(0)) // len(several))
        with contextlib.ExitStack() as stack:
            started = [stack.enter_context(Contender(name, label, threads)) for label in several]
            yield from [contender for contender in started if contender.agrees(shipped)]


def kind_rows(contender: Contender) -> Iterator[Row]:
    """Yield a row for each kind of kernels in a call."""
    microseconds, flops = contender.ask("profile")
    whole = sum(microseconds.values())
    for kind, spent in microseconds.items():
        told = f", {flops[kind] / spent / 1e6:.0f} TFLOP/s" if flops[kind] and spent else ""
        share = f"{spent / whole:.0%} of the call{told}"
        yield Row(
            case=f"{contender.name}, batch 2, {contender.label}: {kind} ({share})",
            metric="GPU time of the kernels of a model call",
            unit="us",
            ours=spent,
            rivals={},
            ratios={},
            values={"model arithmetic, TFLOP": flops[kind] / 1e12},
        )


class Made(NamedTuple):
    """What a process says of its call."""

    seconds: float  # until it was compiled
    repeats: bool
    output: Any  # float32 array


class Contender:
    """A lever in a process of its own, which compiles from nothing."""

    def __init__(self, name: str, label: str, threads: int = 4) -> None:
        self.name, self.label = name, label
        self._threads = threads  # that compile

    def __enter__(self) -> Contender:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = context.Process(
            target=contend,
            args=(theirs, self.name, self.label, self._folder.name, self._threads),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._folder.cleanup()

    @functools.cached_property
    def made(self) -> Made:
        made: Made = self._answer()
        return made

    @functools.cached_property
    def expected(self) -> Any:
        """The float32 model's output."""
        return self.ask("float32")

    def wait(self) -> None:
        """Until it is compiled, and the float32 model's output is there."""
        _ = self.expected

    def ask(self, question: str | float) -> Any:
        """The process's answer, see `contend`; its failures are raised here."""
        assert self.made
        self._pipe.send(question)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise AssertionError("its process ended") from None
        if isinstance(answer, str):
            raise AssertionError(answer)
        return answer

    def agrees(self, shipped: Contender) -> bool:
        """Wait until it is compiled; whether it is, and computes what the shipped one does."""
        expected = shipped.expected
        bound = SPREAD * np.linalg.norm(shipped.made.output - expected)
        try:
            if not np.linalg.norm(self.made.output - expected) <= bound:
                raise AssertionError("farther from the float32 model than the shipped call")
        except AssertionError as error:
            print(f"     {self.name}, {self.label}: {error}", flush=True)
            return False
        return True

    def against(self, shipped: Contender, rounds: int) -> tuple[float, float]:
        """Its gain over the shipped call, and its microseconds: medians over turns."""
        times = [(shipped.ask(0.1), self.ask(0.1)) for _ in range(rounds)]
        gain = statistics.median(theirs / ours for theirs, ours in times)
        return gain, statistics.median(ours for _, ours in times) * 1e6

    def row(self, gain: float, microseconds: float) -> Row:
        bits = "repeats its bits" if self.made.repeats else "DOES NOT REPEAT ITS BITS"
        return Row(
            case=f"{self.name}, batch 2, {self.label} ({bits}; ready in {self.made.seconds:.0f} s)",
            metric="GPU time of a model call",
            unit="us",
            ours=microseconds,
            rivals={SHIPPED: gain * microseconds},
            ratios={SHIPPED: gain},
        )

    def bits_row(self, other: Made) -> Row:
        """A row that compares it with another process of the same lever."""
        return Row(
            case=f"{self.name}, batch 2, {self.label}, in another process",
            metric="share of the output with the same bits",
            unit="",
            ours=float((self.made.output == other.output).mean()),
            rivals={},
            ratios={},
        )


@torch.no_grad()
def contend(pipe: Connection, name: str, label: str, folder: str, threads: int) -> None:
    """Make a lever's call, say so, and serve: seconds of a call over about so many seconds of them,
    the output of the "float32" model, or the "profile" and arithmetic of the call."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
    os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
    inductor.compile_threads = threads
    warnings.simplefilter("ignore")
    try:
        model = models.denoiser(name, 2, "cuda", torch.bfloat16)
        sample = models.latents(name, 2, "cuda").bfloat16()
        timestep = torch.full((1,), 501, device="cuda").expand(2)
        lever = LEVERS[label]
        lever.change(model.unet)
        with reproducible(), lever.settings():
            replay, made = prepare(model, sample, timestep, compiled=lever.compiled)
        pipe.send(made)
        while True:
            question = pipe.recv()
            if question == "float32":
                pipe.send(in_float32(model, sample, timestep))
            elif question == "profile":
                pipe.send((profile(replay), arithmetic(model, sample, timestep)))
            else:
                calls = max(1, int(question / seconds_of_call(replay, 2, "cuda")))
                pipe.send(seconds_of_call(replay, calls, "cuda"))
    except EOFError:
        return
    except Exception as error:
        pipe.send(" ".join(f"{type(error).__name__}: {error}".split())[:300])


def prepare(
    model: models.Denoiser, sample: Tensor, timestep: Tensor, *, compiled: bool
) -> tuple[Callable[[], object], Made]:
    """Return a captured call, and what is to be said of it."""
    began = time.perf_counter()
    call = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    outputs = [call(sample, timestep).clone() for _ in range(3)]
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    replay = captured(lambda: call(sample, timestep))
    torch.cuda.empty_cache()
    repeats = all(torch.equal(outputs[0], other) for other in outputs[1:])
    return replay, Made(seconds, repeats, outputs[0].float().cpu().numpy())


def in_float32(model: models.Denoiser, sample: Tensor, timestep: Tensor) -> Any:
    """The output of the model of the same weights in float32."""
    wide = model.to(torch.float32, copy.deepcopy(model.unet).float())
    output = wide(sample.float(), timestep).cpu().numpy()
    del wide
    torch.cuda.empty_cache()
    return output


def arithmetic(model: models.Denoiser, sample: Tensor, timestep: Tensor) -> dict[str, float]:
    """Floating point operations of a call's products, by kind."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(sample, timestep)
    counted = dict.fromkeys(_KINDS, 0.0)
    for operator, flops in counter.get_flop_counts()["Global"].items():
        counted[_kind(str(operator), 1)] += flops
    return counted


def profile(replay: Callable[[], object], calls: int = 10) -> dict[str, float]:
    """Microseconds of the kernels of a call, by kind."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            replay()
        torch.cuda.synchronize()
    spent = dict.fromkeys(_KINDS, 0.0)
    for event in profiler.key_averages():
        spent[_kind(event.key, 0)] += event.self_device_time_total / calls
    return spent


def _kind(name: str, column: int) -> str:
    """What a kernel or an operator belongs to."""
    return next(
        kind for kind, patterns in _KINDS.items() if re.search(patterns[column], name.lower())
    )
