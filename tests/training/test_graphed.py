"""What is captured of a model call and replayed, where no GPU is: a graph that computes again."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("accelerate")

from inpo_fast.determinism import deterministic_gradients
from inpo_fast.training import graphed
from inpo_fast.training.families import FAMILIES, Conditioning
from inpo_fast.training.trainer import PreferenceTrainer
from inpo_fast.training.trajectory import Call

from . import tiny


class Replayed:
    """A CUDA graph's behaviour: it computes again, from the same memory into the same memory."""

    def __init__(self, body, output):
        self.body, self.output = body, output

    def replay(self):
        self.output.copy_(self.body())


@pytest.fixture
def graphs(monkeypatch):
    def capture(body, warm_up, *, pool, stream):
        output = body()
        return Replayed(body, output), output

    monkeypatch.setattr(graphed, "capture", capture)
    with monkeypatch.context() as absent:
        absent.setattr(torch.cuda, "Stream", lambda device: None)
        absent.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        return graphed.Graphs(torch.device("cpu"))


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_a_replay_reads_what_it_is_given_and_its_results_stay(graphs):
    x, y = numbers(2, 3), numbers(2, 3)
    first = graphs.call("sum", torch.add, x, x)
    second = graphs.call("sum", torch.add, y * 2, y)
    assert torch.equal(first, x + x)
    assert torch.equal(second, y * 2 + y)
    assert len(graphs) == 1
    # and a replay writes to nothing of a call before it
    assert torch.equal(x, numbers(2, 3))


def test_every_shape_layout_dtype_name_and_setting_has_its_own(graphs):
    x = numbers(2, 3, 4, 4)
    given = [x, x[:1], x.to(memory_format=torch.channels_last), x.double(), x[:1].expand_as(x)]
    for _ in range(2):
        for value in given:
            assert torch.equal(graphs.call("double", lambda x: 2 * x, value), 2 * value)
    assert len(graphs) == 5
    assert torch.equal(graphs.call("triple", lambda x: 3 * x, x), 3 * x)
    assert len(graphs) == 6
    with deterministic_gradients():
        graphs.call("triple", lambda x: 3 * x, x)
    assert len(graphs) == 7


def test_a_capture_that_fails_leaves_nothing(graphs):
    def failing(x):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        graphs.call("double", failing, numbers(2))
    assert len(graphs) == 0
    assert torch.equal(graphs.call("double", lambda x: 2 * x, numbers(2)), 2 * numbers(2))


def test_nothing_is_kept_for_a_gradient(graphs):
    x = numbers(2).requires_grad_()
    assert not graphs.call("double", lambda x: 2 * x, x).requires_grad


def test_gradients_go_on_in_the_same_memory():
    """From none, from those of a batch without a graph, and from their own."""
    model = torch.nn.Linear(2, 1)
    frozen = model.bias.requires_grad_(False)
    model.unused = unused = torch.nn.Parameter(torch.ones(1))
    sums = graphed._Sums(model)
    model(torch.ones(1, 2)).sum().backward()
    first = model.weight.grad
    had = sums.drop()
    sums.make([p for p, found in had if found is not None])
    assert model.weight.grad is None
    sums.give(had)
    assert model.weight.grad is first
    sums.drop()
    sums.hand_out()
    own = model.weight.grad
    assert frozen.grad is None and unused.grad is None and torch.equal(own, torch.zeros(1, 2))
    own.add_(3)
    sums.hand_out()
    assert model.weight.grad is own and torch.equal(own, torch.full((1, 2), 3.0))
    assert dict(sums.drop())[model.weight] is own and model.weight.grad is None
    sums.hand_out()
    assert model.weight.grad is own and torch.equal(own, torch.zeros(1, 2))
    model.weight.grad = torch.full((1, 2), 5.0)
    sums.hand_out()
    assert model.weight.grad is own and torch.equal(own, torch.full((1, 2), 5.0))


class Deferred:
    """Captures of forwards and backwards in turns: a replayed forward computes again, and a
    backward, which does not run when it is captured, is that of its forward's last replay."""

    def __init__(self, graphs):
        self.graphs, self.latest, self.captured = graphs, {}, 0

    def __call__(self, body, warm_up, *, pool, stream):
        warm_up()
        number, backward = divmod(self.captured, 2)
        self.captured += 1
        if backward:
            return Deferred.Replayed(lambda: self._backward(number)), None
        output = body()

        def forward():
            with torch.enable_grad():
                self.latest[number] = body()
            output.data.copy_(self.latest[number])

        return Deferred.Replayed(forward), output

    def _backward(self, number):
        gradient = list(self.graphs._learnable.values())[number].gradient
        self.latest.pop(number).backward(gradient)

    class Replayed:
        def __init__(self, replay):
            self.replay = replay


def test_replayed_gradients_add_up(graphs, monkeypatch):
    """Over sizes that take turns, whose graphs are captured in the middle of a step."""
    monkeypatch.setattr(graphed, "capture", capture := Deferred(graphs))
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    model[0].bias.requires_grad_(False)
    inputs = [numbers(count, 3) * scale for scale, count in enumerate((2, 1, 2, 1, 5), 1)]

    def gradients(call):
        model.zero_grad(set_to_none=True)
        for x in inputs:
            call(x).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients(model)
    found = gradients(lambda x: graphs.learn(model, model, x))
    assert capture.captured == 2 * 3 == 2 * len(graphs)
    again = gradients(lambda x: graphs.learn(model, model, x))
    assert capture.captured == 6
    for truth, first, second in zip(expected, found, again, strict=True):
        assert (truth is None and first is None) or torch.equal(truth, first)
        # the same memory from step to step
        assert first is second
    # what is not finite leaves nothing behind
    graphs.learn(model, model, inputs[0] * torch.nan).sum().backward()
    again = gradients(lambda x: graphs.learn(model, model, x))
    assert all(a is b for a, b in zip(again, found, strict=True))
    assert torch.equal(again[0], expected[0])


def test_a_failed_capture_keeps_the_gradients(graphs, monkeypatch):
    def failing(body, warm_up, *, pool, stream):
        warm_up()
        raise RuntimeError("no memory")

    model = torch.nn.Linear(3, 1)
    model(numbers(2, 3)).sum().backward()
    before, copy = model.weight.grad, model.weight.grad.clone()
    monkeypatch.setattr(graphed, "capture", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        graphs.learn(model, model, numbers(2, 3))
    assert model.weight.grad is before and torch.equal(before, copy) and len(graphs) == 0


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("compile", ["none", "blocks"])
def test_the_calls_with_gradient_that_have_graphs(alone, compile, graphs, tmp_path, monkeypatch):
    """Not those of several processes, whose wrapper exchanges gradients, nor compiled ones."""
    run = PreferenceTrainer(
        tiny.config(tiny.save_pipeline(tmp_path / "model"), tmp_path / "out"), dataset=tiny.pairs()
    )
    learner = run.learner
    learner.config = replace(learner.config, compile=compile)
    monkeypatch.setattr(type(learner.accelerator), "num_processes", 1 if alone else 2)
    learner.graphs = graphs
    monkeypatch.setattr(graphs, "learn", lambda *given: "replayed")
    monkeypatch.setattr(learner, "_predict", lambda model, *given: model)
    batch = next(run.data.loader(run.order, device=torch.device("cpu")))
    told = Conditioning(batch.text, None, None)
    found = learner._learnable(Call(batch.latents, torch.zeros(4), None, False), told)
    graphed_one = alone and compile == "none"
    assert found is learner.networks.wrapped if not graphed_one else found == "replayed"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_reads_nothing_beside_what_its_graph_is_given(family, graphs, tmp_path):
    """Latents, times, every text embedding and the sizes are those of the call, not the first's."""
    folder = tiny.save_pipeline(tmp_path / "model", family)
    xl = family == "StableDiffusionXLPipeline"
    config = tiny.config(folder, tmp_path / "out", rank=2)
    run = PreferenceTrainer(config, dataset=tiny.pairs(xl=xl))
    learner = run.learner
    batch = next(run.data.loader(run.order, device=torch.device("cpu")))
    count = 2 * len(batch)
    flow = not run.model.schedule.discrete

    def call(scale):
        times = torch.tensor([0.3, 0.9, 0.5, 0.7][:count]) if flow else torch.arange(count) * 90
        text = {name: scale * torch.cat([value] * 2) for name, value in batch.text.items()}
        ids = None if batch.time_ids is None else scale * batch.time_ids
        told = Conditioning(text, ids, config.guidance_scale)
        return Call(scale * batch.latents, (times * scale).to(times.dtype), None, False), told

    calls = [call(1), call(2)]
    expected = [learner._infer(run.policy, *given) for given in calls]
    assert not torch.equal(*expected)
    learner.graphs = graphs
    for _ in range(2):
        for given, output in zip(calls, expected, strict=True):
            assert torch.equal(learner._infer(run.policy, *given), output)
    assert len(graphs) == 1
