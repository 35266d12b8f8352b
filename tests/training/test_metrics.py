"""What is logged: means, throughput, FLOPs."""

import torch
from torch import nn

from inpo_fast.training.metrics import Meter, Throughput, count_flops, on_meta


def test_a_meter_averages_between_reads():
    meter = Meter()
    for value in (1.0, 2.0, 6.0):
        meter.add({"a": torch.tensor(value), "b": torch.tensor(-value, dtype=torch.float64)})
    meter.add({"c": torch.tensor(5.0)})
    seen = []

    def reduce(tensor):
        seen.append(tensor.shape)
        return tensor * 2

    assert meter.read(reduce) == {"a": 6.0, "b": -6.0, "c": 10.0}
    # one exchange, and one copy to the host, for all of them
    assert seen == [(3,)]
    assert meter.read(reduce) == {}


def test_flops_of_a_convolution_and_its_backward():
    layers = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 2, 1))
    structure = on_meta(layers)
    image = torch.empty(1, 3, 8, 8, device="meta")
    forward, backward = count_flops(lambda: structure(image))
    first, second = 2 * 64 * 3 * 9 * 5, 2 * 64 * 5 * 2
    assert forward == first + second
    # weights of both layers, and the input of the second only
    assert backward == first + 2 * second
    # the structure is a copy without data
    assert all(p.device.type == "meta" for p in structure.parameters())
    assert all(p.device.type == "cpu" for p in layers.parameters())


def test_throughput_leaves_pauses_out(monkeypatch):
    clock = iter([0.0, 3.0, 7.0, 9.0])
    monkeypatch.setattr("inpo_fast.training.metrics.time.perf_counter", lambda: next(clock))
    speed = Throughput()
    speed.samples, speed.flops = 10, 4e6
    with speed.paused():
        pass
    # 9 seconds, of which 4 were a pause
    assert speed.look(peak=1e7) == {"samples_per_second": 2.0, "mfu": 4e6 / 5 / 1e7}
    assert (speed.samples, speed.flops) == (0, 0)
