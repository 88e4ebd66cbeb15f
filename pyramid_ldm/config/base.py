"""Reading a YAML file and `key=value` arguments into a typed dataclass, with one-line errors."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

T = TypeVar("T")


class ConfigError(ValueError):
    """A config is wrong; the message is one line naming the key, the fault and the remedy."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raises ConfigError unless `value` is one of `choices`."""
    require(value in choices, f"{key} is {value!r}; choose one of {', '.join(choices)}")


def load_config(schema: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """The dataclass `schema` filled from a YAML file, then from `key=value` arguments.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (with the nearest known one), a value of the wrong type,
            a missing required value, or a rule of the dataclass's `__post_init__` that does not hold.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # yaml raises many kinds; all mean the same to the user
        raise ConfigError(f"{path}: not valid YAML ({_one_line(error)})") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected 'key: value' lines at the top level")
    return build_config(schema, [(str(path), loaded), *_parse_overrides(overrides)])


def load_saved(schema: type[T], path: Path) -> T:
    """A config that `save_config` wrote."""
    return load_config(schema, path)


def save_config(config: Any, path: Path) -> None:
    """Writes a dataclass config as YAML, every key resolved."""
    path.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Any) -> str:
    """A dataclass config as YAML text."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def build_config(schema: type[T], sources: Sequence[tuple[str, DictConfig]]) -> T:
    """Merges the sources in order over the schema's defaults."""
    merged = OmegaConf.structured(schema)
    for origin, source in sources:
        try:
            merged = OmegaConf.merge(merged, source)
        except ConfigKeyError as error:
            raise ConfigError(f"{origin}: unknown key {_nearest(schema, _leaf(source, str(error.full_key)))}") from None
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a mapping given where a list belongs
            raise ConfigError(f"{origin}: {_located(error)}") from None
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]} is not set; give it as {missing[0]}=VALUE")
        result = OmegaConf.to_object(merged)
    except ConfigError as error:
        raise ConfigError(f"{sources[0][0]}: {error}") from None
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(f"{sources[0][0]}: {_located(error)}") from None
    assert isinstance(result, schema)
    return result


def _parse_overrides(overrides: Sequence[str]) -> list[tuple[str, DictConfig]]:
    parsed = []
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"{text!r} is not key=value, for example train.batch_size=8")
        try:
            parsed.append((text, OmegaConf.from_dotlist([text])))
        except Exception as error:
            raise ConfigError(f"{text!r}: {_one_line(error)}") from None
    return parsed


def _nearest(schema: Any, key: str) -> str:
    """The key in quotes, and the known key nearest to it."""
    known = _all_keys(schema)
    # "trian.images" should find "train.images", and "batch_size" should find "train.batch_size".
    scored = sorted(known, key=lambda name: _similarity(key, name), reverse=True)
    best = scored[0] if scored and _similarity(key, scored[0]) > 0.6 else None
    return f"'{key}'" + (f"; did you mean '{best}'?" if best else "")


def _similarity(key: str, name: str) -> float:
    whole = difflib.SequenceMatcher(None, key, name).ratio()
    last = difflib.SequenceMatcher(None, key.rsplit(".", 1)[-1], name.rsplit(".", 1)[-1]).ratio()
    return max(whole, 0.9 * last)


def _all_keys(schema: Any, prefix: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(schema):
        keys.append(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            keys += _all_keys(field.type, f"{prefix}{field.name}.")
    return keys


def _leaf(source: DictConfig, key: str) -> str:
    """`key`, which may name an unknown section, down to the first value in it: "trian" -> "trian.images"."""
    node = OmegaConf.select(source, key, default=None, throw_on_missing=False)
    while isinstance(node, DictConfig) and len(node):
        name = str(next(iter(node)))
        key, node = f"{key}.{name}", node._get_node(name)
    return key


def _located(error: Exception) -> str:
    """The error in one line, after its key where that is known."""
    key = getattr(error, "full_key", None)
    return f"{key}: {_one_line(error)}" if key else _one_line(error)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[0] if lines else type(error).__name__
