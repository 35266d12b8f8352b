"""Every Python snippet of the README runs, in order, in one session."""

import re
from pathlib import Path

import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def test_snippets_run_and_do_what_they_say(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(snippets) == 3
    names = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README snippet {number}", "exec"), names)
        if number == 1:
            sampler = names["Sampler"](names["model"], names["program"], guidance_scale=3.0)
            start = sampler.start(names["latents"])
            assert names["back"].equal(start) and not names["noise"].equal(start)
    # policy and reference are the same model: the loss is ln 2
    torch.testing.assert_close(names["loss"].detach(), torch.tensor(2.0).log())


def test_commands_are_those_of_the_makefile():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"make (\w+) ", README.read_text(encoding="utf-8"))
    assert {"demo", "test"} <= set(commands)
    for command in set(commands) - {"and"}:
        assert f"\n{command}:" in makefile
