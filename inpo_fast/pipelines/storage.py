"""Inversions on disk: one safetensors file with everything that the way back needs.

A file holds the state, the image latents, the encoded prompts and, as text, what they belong to:
pipeline class, fingerprints of its models, schedule, solver, prompts, guidance and settings.
Loading compares them with the pipeline that is given and with what the caller expects.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import read_tensors, write_tensors
from ..solvers.program import unwarned
from ..state import State
from .adapter import Adapter, Conditioning, Request
from .fingerprint import Fingerprint, check_dtypes, fingerprint
from .inversion import Inversion
from .plan import Factory, Plan, make_plan, resolve
from .request import adapter_of, make_schedule

FORMAT = "inpo_fast.inversion/2"

_STATE = "state."
_TOLD = "conditioning."
_COMPARED = ("prompt", "negative_prompt", "guidance_scale")
_REPORT = ("vae_floor", "model_calls", "interrupted", "bits_equal", "latent_error")


def save(inversion: Inversion, path: str | os.PathLike[str]) -> None:
    """Write an inversion under a temporary name, then rename.

    Raises:
        TypeError: a solver parameter or setting that is not plain data.
        OSError: it cannot be written.
    """
    tensors, state = inversion.state.pack()
    request, plan = inversion.request, inversion.plan
    restored = inversion.adapter.restored_options(inversion.conditioning)
    settings = {
        name: value
        for name, value in request.options.items()
        if name in inversion.adapter.setting_options and name not in restored
    }
    header = {
        "pipeline": inversion.adapter.pipeline_class,
        "models": dict(inversion.models),
        "grid": inversion.grid,
        "schedule": plan.schedule.fingerprint,
        "solver": plan.solver,
        "parameters": {name: _plain(name, value) for name, value in plan.parameters.items()},
        "updates": len(plan.to_noise.updates),
        "program": plan.to_noise.fingerprint,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "guidance_scale": request.guidance_scale,
        "size": request.size,
        "settings": {name: _plain(name, value) for name, value in settings.items()},
        "told": dict(inversion.conditioning.settings),
        "state_kind": inversion.state_kind,
        "compile": inversion.compile,
        "state": state,
        "report": {name: getattr(inversion, name) for name in _REPORT},
    }
    named = {_STATE + name: tensor for name, tensor in tensors.items()}
    named |= {_TOLD + name: tensor for name, tensor in inversion.conditioning.tensors.items()}
    named["image_latents"] = inversion.image_latents
    if inversion.null_embeddings is not None:
        named["null_embeddings"] = inversion.null_embeddings
    # safetensors refuses tensors that share memory, as repeated and expanded ones do
    named = {name: tensor.detach().clone().contiguous() for name, tensor in named.items()}
    write_tensors(Path(path), named, {"format": FORMAT, "inversion": json.dumps(header)})


def load(
    path: str | os.PathLike[str],
    pipe: Any,
    *,
    solver: str | Factory | None = None,
    **expected: Any,
) -> Inversion:
    """Read an inversion for a pipeline.

    Args:
        path: what `save` wrote.
        pipe: the pipeline that made it, or an equal one.
        solver: must be the file's; a solver that is not in `inpo_fast.SOLVERS` has to be given.
        expected: any of `prompt`, `negative_prompt`, `guidance_scale`, `num_inference_steps`,
            `timesteps`, `sigmas` and `strength`, and the parameters of the solver and settings of
            the pipeline's family that the file has, as given to `invert`; must be the file's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, of another version, made with another model, dtype, schedule
            or solver, or not what is expected.
        TypeError: a solver that is neither a name nor a function, or unknown arguments.
    """
    name = os.fspath(path)
    if solver is not None:
        resolve(solver)
    _, fields = read_tensors(path)
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{name} is not an inversion of this version of inpo_fast: format must be {FORMAT!r}, "
            f"got {fields.get('format')!r}; invert the image again"
        )
    with _reading(name):
        header = json.loads(fields["inversion"])
        held = {told: header[told] for told in _COMPARED} | header["grid"]
        for extra in ("parameters", "settings"):
            held |= {told: _restored(value) for told, value in header[extra].items()}
    if unknown := sorted(expected.keys() - held.keys()):
        raise TypeError(f"{name} has no {unknown} to compare, but {', '.join(held)}")
    adapter = adapter_of(pipe)
    tensors, _ = read_tensors(path, adapter.device)
    with _reading(name):
        _compare_models(name, header, adapter)
        _compare_expected(name, held, expected)
        plan = _plan(name, header, adapter, solver)
        return _inversion(header, tensors, adapter, plan, name)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Errors of a header that is not as `save` writes it are the file's."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} has a damaged header: {error!r}") from error


def _compare_models(path: str, header: Mapping[str, Any], adapter: Adapter) -> None:
    if header["pipeline"] != adapter.pipeline_class:
        raise ValueError(
            f"{path} was made with a {header['pipeline']}, got a {type(adapter.pipe).__name__}"
        )
    saved, modules = _models(header), adapter.modules()
    check_dtypes(path, saved, modules)
    models = {name: fingerprint(module) for name, module in modules.items()}
    if other := sorted(n for n in models.keys() | saved.keys() if models.get(n) != saved.get(n)):
        raise ValueError(
            f"{path} was made with another model: the configuration, weights, adapters or "
            f"attention processors of {', '.join(other)} differ from the pipeline's"
        )


def _models(header: Mapping[str, Any]) -> dict[str, Fingerprint]:
    return {name: Fingerprint(*fields) for name, fields in header["models"].items()}


def _compare_expected(path: str, held: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        # also of numpy and torch
        mine, theirs = held[name], value.tolist() if hasattr(value, "tolist") else value
        if isinstance(mine, list) and isinstance(theirs, (str, int, float)):
            # one for all images
            theirs = [theirs] * len(mine)
        elif isinstance(theirs, tuple):
            theirs = list(theirs)
        if mine != theirs:
            raise ValueError(f"{path} was made with {name} {mine!r}, expected {value!r}")


def _plan(
    path: str, header: Mapping[str, Any], adapter: Adapter, solver: str | Factory | None
) -> Plan:
    """The file's programs, made anew and compared."""
    schedule = make_schedule(adapter, size=tuple(header["size"]), **header["grid"])
    parameters = {name: _restored(value) for name, value in header["parameters"].items()}
    try:
        with unwarned():
            # of its amplification whoever inverted was warned
            plan = make_plan(header["solver"] if solver is None else solver, schedule, parameters)
    except TypeError as error:
        raise ValueError(
            f"{path} was made with solver {header['solver']!r} and its parameters {parameters}, "
            f"from which no program can be made: {error}"
        ) from error
    if plan.solver != header["solver"]:
        raise ValueError(f"{path} was made with solver {header['solver']!r}, got {plan.solver!r}")
    if header["updates"] < len(plan.to_noise.updates):
        plan = plan.stopped(header["updates"])
    if plan.schedule.fingerprint != header["schedule"]:
        raise ValueError(
            f"{path} was made with another schedule: pipe.scheduler "
            f"({type(adapter.pipe.scheduler).__name__}) has other noise levels, timesteps or "
            "another prediction type"
        )
    if plan.to_noise.fingerprint != header["program"]:
        raise ValueError(
            f"{path} was made by another version of the solver {plan.solver!r}; invert the image "
            "again"
        )
    return plan


def _inversion(
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    adapter: Adapter,
    plan: Plan,
    path: str,
) -> Inversion:
    def named(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    conditioning = Conditioning(named(_TOLD), header["told"])
    guidance = header["guidance_scale"]
    latents = tensors["image_latents"]
    return Inversion(
        adapter=adapter,
        plan=plan,
        request=Request(
            prompt=header["prompt"],
            negative_prompt=header["negative_prompt"],
            batch=len(latents),
            size=(header["size"][0], header["size"][1]),
            guidance_scale=tuple(guidance) if isinstance(guidance, list) else guidance,
            options={
                **{name: _restored(value) for name, value in header["settings"].items()},
                **adapter.restored_options(conditioning),
            },
        ),
        conditioning=conditioning,
        image_latents=latents,
        state=State.unpack(named(_STATE), header["state"], path),
        state_kind=header["state_kind"],
        compile=header["compile"],
        null_embeddings=tensors.get("null_embeddings"),
        models=_models(header),
        grid=header["grid"],
        **header["report"],
    )


def _plain(name: str, value: Any) -> Any:
    """`value` as JSON."""
    if isinstance(value, Fraction):
        return {"fraction": str(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    if isinstance(value, Real) and not isinstance(value, bool):
        # also of numpy
        return int(value) if isinstance(value, Integral) else float(value)
    if value is None or isinstance(value, (bool, str)):
        return value
    raise TypeError(f"{name} cannot be saved: it must be plain data, got {type(value).__name__}")


def _restored(value: Any) -> Any:
    return Fraction(value["fraction"]) if isinstance(value, dict) else value
