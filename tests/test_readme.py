"""Every Python snippet of the README runs, in order, in one session."""

import re
from pathlib import Path

import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def test_snippets_run_and_do_what_they_say(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(snippets) == 5
    names = {}
    monkeypatch.chdir(tmp_path)
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README snippet {number}", "exec"), names)
    assert names["reconstruction"].bits_equal
    sampler = names["Sampler"](names["model"], names["program"], guidance_scale=3.0)
    start = sampler.start(names["latents"])
    assert names["back"].equal(start) and not names["noise"].equal(start)


def test_commands_are_those_of_the_makefile():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"make (\w+) ", README.read_text(encoding="utf-8"))
    assert {"demo", "test"} <= set(commands)
    for command in set(commands) - {"and"}:
        assert f"\n{command}:" in makefile
