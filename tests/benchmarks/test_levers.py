"""Levers are timed on a GPU only; how they are told apart, and what fails, is seen anywhere."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import levers


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_poi_fused__scaled_dot_product_attention_convolution_3", "norms, activations"),
        ("triton_tem_fused_addmm_convolution_native_layer_norm_view_12", "matrix products"),
        ("_geglu_kernel", "norms, activations"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized>", "convol"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kernels_are_told_apart(kernel, kind):
    assert levers._kind(kernel, 0).startswith(kind)


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten._scaled_dot_product_flash_attention", "attention"),
        ("aten.convolution", "convolutions"),
        ("aten.addmm", "matrix products"),
        ("aten.bmm", "matrix products"),
    ],
)
def test_operators_are_told_apart(operator, kind):
    assert levers._kind(operator, 1) == kind


def test_a_lever_that_fails_is_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = np.ones(3, np.float32)
    shipped = SimpleNamespace(made=levers.Made(0.0, True, output), expected=output + 0.1)
    with levers.Contender("sd15-small", "fused QKV") as contender:
        assert not contender.agrees(shipped)
    assert "sd15-small, fused QKV: " in capsys.readouterr().out


@pytest.mark.parametrize(("distance", "agrees"), [(0.14, True), (0.2, False)])
def test_a_lever_is_as_near_to_float32_as_the_shipped_call(distance, agrees):
    expected = np.zeros(3, np.float32)
    shipped = SimpleNamespace(made=levers.Made(0.0, True, expected + 0.1), expected=expected)
    contender = levers.Contender("sd15-small", "fused QKV")
    contender.made = levers.Made(0.0, True, expected - distance)
    assert contender.agrees(shipped) == agrees


class Fake(levers.Contender):
    """Has made its output at once, and knows how fast it is."""

    def __enter__(self):
        assert self.label not in TUNED or "float32" in ASKED, "the shipped call is being compiled"
        SLOTS.append(self.label)
        self.made = levers.Made(1.0, True, np.ones(3, np.float32))
        return self

    def __exit__(self, *_):
        SLOTS.remove(self.label)

    def ask(self, question):
        ASKED.append(question)
        if self.label not in (levers.SHIPPED, *TUNED):
            assert not set(SLOTS) & set(TUNED)
        elif self.label in TUNED:
            assert SLOTS == [levers.SHIPPED, self.label], "nothing else runs while it is tuned"
        if question == "float32":
            return np.zeros(3, np.float32)
        if question == "profile":
            return dict.fromkeys(levers._KINDS, 1.0), dict.fromkeys(levers._KINDS, 0.0)
        return 0.5 if self.label in FASTER else 1.0


SLOTS, ASKED = [], []
FASTER = ["freezing", "max-autotune"]
TUNED = [label for label, lever in levers.LEVERS.items() if lever.tuned]


@pytest.fixture
def faked(monkeypatch):
    memory = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(levers, "Contender", Fake)
    ASKED.clear()


def cases(*only):
    return [row.case for row in levers.rows("cuda", True, only)]


def test_each_lever_is_told_and_those_that_pay_come_twice(faked):
    told = cases("sd15")
    assert not SLOTS and all(case.startswith("sd15, batch 2, ") for case in told)
    for label, lever in levers.LEVERS.items():
        mine = [case for case in told if case.startswith(f"sd15, batch 2, {label}")]
        twice = any("in another process" in case for case in mine)
        assert twice == (label in FASTER)
        kinds = [case for case in mine if case.startswith(f"sd15, batch 2, {label}: ")]
        wanted = label == levers.SHIPPED or not lever.compiled
        assert len(kinds) == (len(levers._KINDS) if wanted else 0)
        assert any("ready in" in case for case in mine) == (label != levers.SHIPPED)


def test_levers_are_chosen_by_name(faked):
    assert [case.split(" (")[0] for case in cases("sdxl", "max-autotune", "fused QKV")] == [
        "sdxl, batch 2, fused QKV",
        "sdxl, batch 2, max-autotune",
        "sdxl, batch 2, max-autotune, in another process",
    ]
    ASKED.clear()
    assert cases("sdxl", "max-autotune")
    with pytest.raises(SystemExit, match="got \\['autotune'\\]"):
        cases("autotune")
