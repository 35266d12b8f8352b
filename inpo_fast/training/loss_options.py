"""Settings of an objective beside its β, each written NAME=VALUE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..losses import OBJECTIVES
from ..losses.registry import Setting


def read(loss_type: str, written: Sequence[str]) -> dict[str, Setting]:
    """The settings by keyword, numbers where the objective's own are.

    Raises:
        ValueError: a name that the objective does not have or that comes twice, or no number.
    """
    own = _beside_beta(OBJECTIVES[loss_type].defaults)
    given: dict[str, Setting] = {}
    for option in written:
        name, equals, value = option.partition("=")
        if not own:
            raise ValueError(f"loss_options must be none, as there is no NAME, got {option!r}")
        if name not in own or not equals:
            raise ValueError(
                f"loss_options must be NAME=VALUE with a NAME of {', '.join(own)}, got {option!r}"
            )
        if name in given:
            raise ValueError(f"loss_options must have each NAME once, got {option!r} again")
        try:
            given[name] = value if isinstance(own[name], str) else float(value)
        except ValueError:
            raise ValueError(f"{name} of loss_options must be a number, got {value!r}") from None
    return given


def write(settings: Mapping[str, Setting]) -> tuple[str, ...]:
    """What `read` reads."""
    return tuple(f"{name}={value}" for name, value in _beside_beta(settings).items())


def described() -> str:
    """All there are, with what they are for SD1.5."""
    all_options = {name: " ".join(write(o.defaults)) for name, o in OBJECTIVES.items()}
    return ", ".join(f"{name} {options}" for name, options in all_options.items() if options)


def _beside_beta(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    return {name: value for name, value in settings.items() if name != "beta"}
