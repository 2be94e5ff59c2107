"""The fields of ``TrainConfig`` as options: their types, values from text and back, and listing. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any, Literal, Union

from megatron_hc.config import DataConfig, TrainConfig, leaf_fields

DEFAULT, CHECKPOINT, COMMAND_LINE = "default", "checkpoint", "command line"


class UsageError(ValueError):
    """The command line or a YAML file is wrong; the message lists everything that is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One field of ``TrainConfig`` as flag and YAML key."""

    name: str
    path: tuple[str, ...]
    """Attribute names from ``TrainConfig`` down to the field."""
    kind: type
    """str, int, float or bool: the type of the value, or of each element with ``many``."""
    choices: tuple[str, ...]
    many: bool
    """A tuple: the flag takes one or more values."""
    optional: bool
    """None is allowed (YAML: null)."""
    required: bool
    default: Any


@cache
def options() -> Mapping[str, Option]:
    """All options by field name, in order of declaration."""
    return types.MappingProxyType({path[-1]: _option(path, leaf) for path, leaf in leaf_fields(TrainConfig)})


def _option(path: tuple[str, ...], leaf: dataclasses.Field) -> Option:
    owner: type = TrainConfig
    for name in path[:-1]:
        owner = typing.get_type_hints(owner)[name]
    hint = typing.get_type_hints(owner)[leaf.name]
    members = [hint]
    if typing.get_origin(hint) in (Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        assert len(members) == 1, f"{leaf.name}: a field has one type, or one type and None"
    kind, many = members[0], typing.get_origin(members[0]) is tuple
    if many:
        kind = typing.get_args(kind)[0]
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else leaf.metadata.get("choices", ())
    kind = str if choices else kind
    assert kind in (str, int, float, bool), f"{leaf.name}: no flag can be made of {hint}"
    default = leaf.default if leaf.default is not dataclasses.MISSING else None
    return Option(
        name=leaf.name,
        path=path,
        kind=kind,
        choices=choices,
        many=many,
        optional=len(members) == 1 and hint is not members[0],
        required=bool(leaf.metadata.get("required")),
        default=default,
    )


def coerce(option: Option, raw: object) -> Any:
    """``raw`` (text, or a value out of YAML or JSON) as the option's declared type.

    Raises:
        ValueError: what the option takes, and what ``raw`` is.
    """
    if raw is None:
        if option.optional:
            return None
        raise ValueError("a value is missing")
    if option.many:
        items = list(raw) if isinstance(raw, list | tuple) else [raw]
        return tuple(_scalar(option, str(item) if _is_number(item) else item) for item in items)
    return _scalar(option, raw)


def _is_number(raw: object) -> bool:
    return isinstance(raw, int | float) and not isinstance(raw, bool)


def _scalar(option: Option, raw: object) -> Any:
    if isinstance(raw, list | tuple | dict):
        raise ValueError(f"takes one value, not {show(raw)}")
    if option.kind is bool:
        if isinstance(raw, bool):
            return raw
        raise ValueError(f"takes true or false, not {show(raw)}")
    if option.kind is int:
        return _integer(raw)
    if option.kind is float:
        return _float(raw)
    if not isinstance(raw, str):
        raise ValueError(f"takes text, not {show(raw)}; put it in quotes")
    if option.choices and raw not in option.choices:
        raise ValueError(f"must be one of {', '.join(option.choices)}, not {show(raw)}{nearest(raw, option.choices)}")
    return raw


def _integer(raw: object) -> int:
    if not isinstance(raw, bool):
        with contextlib.suppress(InvalidOperation, OverflowError, ValueError):
            number = Decimal(str(raw))
            # 1e3000000 has as many digits, and Python would take minutes to write them all down.
            if number.adjusted() < 30 and number == (whole := int(number)):
                return whole
    raise ValueError(f"takes a whole number, not {show(raw)}")


def _float(raw: object) -> float:
    if not isinstance(raw, bool) and isinstance(raw, int | float | str):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := float(raw)):
                return number
    raise ValueError(f"takes a finite number, not {show(raw)}")


def show(raw: object) -> str:
    """``raw`` as an error message shows it, cut to 60 characters."""
    return repr(raw) if len(repr(raw)) <= 60 else repr(raw)[:57] + "..."


def nearest(name: str, known: Sequence[str], spell: Callable[[str], str] = str) -> str:
    """`` (did you mean X?)``, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {spell(near[0])}?)" if near else ""


def from_flat(values: Mapping[str, object]) -> TrainConfig:
    """The configuration of ``values`` by field name; defaults for the rest. ``ValueError`` at a wrong name or type."""
    unknown = [name for name in values if name not in options()]
    if unknown:
        raise UsageError(f"{', '.join(unknown)}: not a setting of this version")
    return _build(TrainConfig, {name: coerce(options()[name], raw) for name, raw in values.items()})


def _build(cls: type, values: Mapping[str, object]) -> Any:
    kwargs: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        if isinstance(item.default_factory, type) and dataclasses.is_dataclass(item.default_factory):
            kwargs[item.name] = _build(item.default_factory, values)
        elif item.name in values:
            kwargs[item.name] = values[item.name]
    return cls(**kwargs)


def to_flat(config: TrainConfig) -> dict[str, Any]:
    """Every setting by field name, in order of declaration."""
    flat: dict[str, Any] = {}
    for name, option in options().items():
        value: Any = config
        for attribute in option.path:
            value = getattr(value, attribute)
        flat[name] = value
    return flat


def dump(config: TrainConfig, origins: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """``{name: {"value": ..., "origin": ...}}``, ready for JSON: what a checkpoint keeps."""
    return {
        name: {"value": list(value) if isinstance(value, tuple) else value, "origin": origins[name]}
        for name, value in to_flat(config).items()
    }


def checkpoint_values(dumped: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that --use-checkpoint-args takes out of a ``dump``: the model's and the tokenizer's."""
    data_fields = {item.name for item in dataclasses.fields(DataConfig)}
    training_only = {option.name for option in options().values() if option.path[0] not in ("model", "data")}
    tokenizer = {"tokenizer_type", "tokenizer_model", "vocab_size"}
    skipped = training_only | (data_fields - tokenizer)
    return {name: entry["value"] for name, entry in dumped.items() if name not in skipped}


def describe(config: TrainConfig, origins: Mapping[str, str]) -> str:
    """The resolved settings, one per line in alphabetical order; the origin follows where it is not the default."""
    lines = [f"{' arguments ':-^72}"]
    for name, value in sorted(to_flat(config).items()):
        origin = f"  [{origins[name]}]" if origins[name] != DEFAULT else ""
        lines.append(f"  {name + ' ':.<44} {value}{origin}")
    return "\n".join([*lines, f"{' end of arguments ':-^72}"])
