"""The demo's results in words and Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..environment import machine, versions
from .align import AlignRow
from .edit import EditRow
from .results import Results
from .roundtrip import RoundTripRow

OBJECTIVES = {"inpo": "InPO", "diffusion-dpo": "Diffusion-DPO"}


def summary(results: Results) -> str:
    """What a person wants to know, in a few lines."""
    return "\n\n".join(
        [
            "Round trip. " + _round_trip_words(results),
            "Edit. " + _edit_words(results.edit.rows),
            "Align. " + _align_words(results.align.rows),
            f"All of it took {results.seconds:.0f} s on {results.device}.",
        ]
    )


def _round_trip_words(results: Results) -> str:
    setting = results.settings.round_trips[0]
    rows = [
        row
        for row in results.roundtrip.rows
        if (row.steps, row.guidance, f"torch.{row.model_dtype}")
        == (setting.steps, setting.guidance, str(setting.model_dtype))
    ]
    solvers = [row for row in rows if row.solver != "ddim"]
    lattice = [row for row in solvers if row.state == "lattice"]
    exact = [row.solver for row in lattice if row.bits_equal]
    drift = [row.max_abs_error for row in solvers if row.state == "float32"]
    ddim = next(row.max_abs_error for row in rows if row.solver == "ddim")
    return (
        f"{results.settings.scenes} images went to noise and back in {setting.steps} steps at "
        f"guidance {setting.guidance:g}. On the lattice {len(exact)} of {len(lattice)} reversible "
        f"solvers brought back every bit ({', '.join(exact) or 'none'}). In float32 the same "
        f"solvers were off by {_span(drift)}; DDIM inversion was off by {_number(ddim)}."
    )


def _span(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{_number(min(known))} to {_number(max(known))}" if known else "more than they can hold"


def _edit_words(rows: Sequence[EditRow]) -> str:
    parts = [
        f"{row.solver} {_percent(row.success)} / {_percent(row.preservation)}"
        for row in rows
        if row.error is None
    ]
    return (
        f"One attribute of each of {rows[0].edits} images was changed through the prompt. Edits "
        f"that succeeded / other attributes kept: {', '.join(parts)}."
    )


def _align_words(rows: Sequence[AlignRow]) -> str:
    base = rows[0]
    parts = [
        f"{OBJECTIVES.get(row.objective, row.objective)} brought it to "
        f"{_percent(row.accuracy_after)} ({100 * row.gain:+.1f} ± {100 * row.gain_se:.1f} points) "
        f"in {row.steps} steps, {row.seconds:.0f} s"
        for row in rows
    ]
    return (
        f"The shipped model gets {_percent(base.accuracy_before)} of the attributes of "
        f"{base.prompts} held-out prompts right. {'; '.join(parts)}."
    )


def markdown(results: Results) -> str:
    """report.md."""
    host = machine()
    found = [f"{name} {version}" for name, version in versions().items() if version]
    return (
        "\n\n".join(
            [
                "# What inpo_fast does, measured on this machine",
                summary(results),
                f"Machine: {host['cpu']}, {host['cores']} cores"
                + "".join(f", {gpu['name']}" for gpu in host["gpus"])
                + f". Versions: {', '.join(found)}. "
                f"Seed {results.seeds['seed']}. The same seed on the same machine gives the same "
                "numbers, times aside.",
                _round_trip_section(results),
                _edit_section(results),
                _align_section(results),
            ]
        )
        + "\n"
    )


def _round_trip_section(results: Results) -> str:
    header = (
        "solver",
        "state",
        "model",
        "guidance",
        "steps",
        "model calls",
        "bits equal",
        "largest error",
        "noise mean",
        "noise std",
        "amplification",
        "seconds",
    )
    return "\n\n".join(
        [
            "## Round trip: image to noise and back",
            f"{results.settings.scenes} held-out scenes as latents, each under its own prompt, "
            "went to noise and back. Model calls count both directions together; with guidance one "
            "call sees the batch twice over. Noise should look like N(0, 1): mean 0, std 1. The "
            "amplification is how much a program on its way to noise may magnify a perturbation. "
            "The autoencoder alone, encoding and decoding, is off by "
            f"{results.roundtrip.vae_floor:.3f} (root mean square, images in [-1, 1]): no "
            "inversion of latents can show an image more truly than that.",
            _table(header, [_round_trip_cells(row) for row in results.roundtrip.rows]),
        ]
    )


def _round_trip_cells(row: RoundTripRow) -> list[str]:
    return [
        row.solver,
        row.state,
        row.model_dtype,
        f"{row.guidance:g}",
        str(row.steps),
        str(row.model_calls),
        row.error or ("yes" if row.bits_equal else "no"),
        _number(row.max_abs_error),
        "" if row.noise_mean is None else f"{row.noise_mean:+.3f}",
        "" if row.noise_std is None else f"{row.noise_std:.3f}",
        f"{row.amplification:.3g}",
        f"{row.seconds:.1f}",
    ]


def _edit_section(results: Results) -> str:
    settings = results.settings
    cells = [
        [
            row.solver,
            row.state,
            f"{row.strength:g}",
            str(row.edits),
            row.error or f"{_percent(row.success)} ± {100 * row.success_se:.1f}",
            "" if row.error else f"{_percent(row.preservation)} ± {100 * row.preservation_se:.1f}",
        ]
        for row in results.edit.rows
    ]
    header = ("solver", "state", "strength", "edits", "succeeded", "others preserved")
    return "\n\n".join(
        [
            "## Edit: change one attribute through the prompt",
            f"Held-out scenes were inverted under their own prompt on a grid of "
            f"{settings.edit_steps} steps at guidance {settings.edit_guidance:g}, and decoded "
            "under a prompt in which one attribute differs. Strength is the fraction of the grid "
            "that was used. Read from the pixels: whether the attribute has its new value, and "
            "which fraction of all other attributes is unchanged; ± is one standard error.",
            _table(header, cells),
            "![edits](edits.png)",
        ]
    )


def _align_section(results: Results) -> str:
    settings = results.settings.align
    cells = [
        [
            OBJECTIVES.get(row.objective, row.objective),
            str(row.steps),
            f"{row.beta:g}",
            f"{row.learning_rate:g}",
            f"{row.seconds:.0f}",
            f"{_percent(row.accuracy_before)} ± {100 * row.accuracy_before_se:.1f}",
            f"{_percent(row.accuracy_after)} ± {100 * row.accuracy_after_se:.1f}",
            f"{100 * row.gain:+.1f} ± {100 * row.gain_se:.1f}",
        ]
        for row in results.align.rows
    ]
    header = ("objective", "steps", "β", "rate", "seconds", "before", "after", "gain")
    return "\n\n".join(
        [
            "## Align: learn from preferences",
            "The whole UNet was trained in float32 with AdamW from the shipped preference pairs, "
            "which are images of the model itself; the same pairs in the same order at the same "
            f"timesteps for each objective. Every step has {settings.pairs} pairs, which share "
            "their number of inversion steps, and every pair a timestep of its own, uniform "
            f"from {settings.first_timestep} on, where noise is strong and attributes are decided. "
            "InPO takes its noisy latents by DDIM inversion under the current policy, on grids "
            f"that reach the last timestep in {settings.max_depth} steps; "
            "Diffusion-DPO adds noise. β and learning rate were chosen for each objective on other "
            "prompts and seeds than these. Right attributes are read from images of "
            f"{settings.prompts} held-out prompts, {settings.sample_steps} DDIM steps at guidance "
            f"{settings.guidance:g} from the same noise before and after; ± is one standard error "
            "over prompts, that of the gain over the same prompts' differences.",
            _table(header, cells),
            "![curves](curves.png)",
            "![before and after](aligned.png)",
        ]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
