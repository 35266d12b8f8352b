"""The demo's files: report.json, report.md and pictures."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..environment import machine, versions
from .align import AlignResult
from .edit import EditResult
from .pipeline import DemoError
from .results import Results
from .text import OBJECTIVES, markdown

FILES = ("report.json", "report.md", "edits.png", "curves.png", "aligned.png")
_SHOWN = 8


def prepare(folder: Path) -> None:
    """Make the output folder, and find out now whether files can be written there.

    Raises:
        DemoError: it cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DemoError(
            f"--output must be a folder, and {folder} is or lies in a file; nothing was changed"
        ) from None
    except OSError as error:
        raise DemoError(f"cannot make the folder {folder}: {error.strerror}") from None
    for name in FILES:
        if (folder / name).is_dir():
            raise DemoError(f"{folder / name} is a folder, where a file has to be written")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DemoError(f"cannot write into the folder {folder}")


def write(folder: Path, results: Results) -> None:
    """Write all files, or none where one cannot be made; other files of the folder stay."""
    rows = as_json(results)
    _write_all(
        folder,
        {
            "edits.png": edit_grid(results.edit),
            "curves.png": curves(results.align),
            "aligned.png": align_grid(results.align),
            "report.md": markdown(results).encode(),
            "report.json": (json.dumps(rows, indent=2, allow_nan=False) + "\n").encode(),
        },
    )


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    temporary = {name: folder / f".{name}.{os.getpid()}" for name in files}
    try:
        for name, data in files.items():
            temporary[name].write_bytes(data)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    except OSError as error:
        raise DemoError(f"cannot write into {folder}: {error.strerror}") from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()


def as_json(results: Results) -> dict[str, Any]:
    """What report.json holds."""
    return {
        "roundtrip": [asdict(row) for row in results.roundtrip.rows],
        "edit": [asdict(row) for row in results.edit.rows],
        "align": [asdict(row) for row in results.align.rows],
        "versions": versions(),
        "seeds": results.seeds,
        "vae_floor": results.roundtrip.vae_floor,
        "edits": [{"prompt": edit.prompt, "change": edit.change} for edit in results.edit.edits],
        "curves": {name: asdict(curve) for name, curve in results.align.curves.items()},
        "settings": json.loads(json.dumps(asdict(results.settings), default=str)),
        "machine": machine(),
        "device": results.device,
        "seconds": results.seconds,
    }


def edit_grid(result: EditResult) -> bytes:
    """Picture: one row an edit, the source and what each solver made of it."""
    columns = {"source": result.sources, **result.edited}
    shown = range(min(_SHOWN, len(result.edits)))
    labels = [f"{result.edits[i].change}" for i in shown]
    return _grid(columns, shown, labels, "Edits through the prompt")


def align_grid(result: AlignResult) -> bytes:
    """Picture: one row a prompt, the base and the aligned models from the same noise."""
    columns = {OBJECTIVES.get(name, name): images for name, images in result.images.items()}
    shown = range(min(_SHOWN, len(result.prompts)))
    labels = [result.prompts[i] for i in shown]
    return _grid(columns, shown, labels, "Same prompt, same noise")


def _grid(
    columns: Mapping[str, Tensor], shown: Sequence[int], labels: Sequence[str], title: str
) -> bytes:
    figure = Figure(figsize=(1.1 * len(columns) + 2.6, 1.1 * len(shown) + 0.6), layout="tight")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(shown), len(columns), squeeze=False)
    for row, index in enumerate(shown):
        for column, (name, images) in enumerate(columns.items()):
            axis = axes[row][column]
            axis.imshow(_pixels(images[index]), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(name, fontsize=8)
            if column == 0:
                axis.set_ylabel(
                    _wrapped(labels[row]), fontsize=6.5, rotation=0, ha="right", va="center"
                )
    return _png(figure)


def _wrapped(text: str, width: int = 28) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def curves(result: AlignResult) -> bytes:
    """Picture: loss and preference accuracy by optimiser step, and the attributes right."""
    figure = Figure(figsize=(9, 2.8), layout="tight")
    loss, accuracy, final = figure.subplots(1, 3)
    for name, curve in result.curves.items():
        loss.plot(_smooth(curve.loss), label=name)
        accuracy.plot(_smooth(curve.accuracy), label=name)
    loss.set(title="loss (running mean)", xlabel="optimiser step")
    accuracy.set(title="pairs ordered rightly (running mean)", xlabel="optimiser step")
    loss.legend(fontsize=8)
    rows = result.rows
    heights = [rows[0].accuracy_before, *(row.accuracy_after for row in rows)]
    errors = [rows[0].accuracy_before_se, *(row.accuracy_after_se for row in rows)]
    final.bar(["base", *(row.objective for row in rows)], heights, yerr=errors, capsize=4)
    final.set(title="attributes right, held out", ylim=(0, 1))
    return _png(figure)


def _smooth(values: Sequence[float], width: int = 7) -> list[float]:
    """Mean over the last `width` values."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _pixels(image: Tensor) -> Any:
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 0).numpy()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
