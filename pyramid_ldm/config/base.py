"""Reading a YAML file and `key=value` arguments into a typed dataclass, with one-line errors.

YAML's own types are not used: `run_dir: 0010` would be 8, and `data.root=set #2` would be `set`. A scalar is text until
the schema says what it is.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pyramid_ldm.config.schema import FORMAT, element, leaves, optional, require
from pyramid_ldm.errors import UserError

__all__ = ["build", "differences", "load_config", "load_saved", "read_yaml", "save_config", "to_yaml"]

T = TypeVar("T")
Tree = dict[str, Any]  # of dicts, lists, text and None

TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
WHOLE = re.compile(r"[+-]?\d[\d_]*")
NULL = re.compile(r"|~|null|Null|NULL")


class _Text(yaml.SafeLoader):
    """YAML of which every scalar is text, or None for a plain `null`; a key that stands twice is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        for name in names:
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, "a key is no text", node.start_mark)
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _scalar(loader: yaml.SafeLoader, node: Any) -> str | None:
    return None if node.style is None and NULL.fullmatch(node.value) else str(node.value)


_Text.add_constructor("tag:yaml.org,2002:str", _scalar)


def read_yaml(path: Path) -> Tree:
    """The file's keys with text as values. UserError where it is missing or not YAML."""
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8-sig"), _Text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({_one_line(error)})") from None
    require(isinstance(loaded, dict), f"{path}: expected 'key: value' lines at the top level")
    tree: Tree = loaded
    return tree


def load_config(schema: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """The dataclass `schema` filled from a YAML file, then from `key=value` arguments.

    Text in an argument is taken as it is, in a file `${key}` stands for another key's value. Numbers are decimal.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest known one), a value of the wrong type or
            out of range, a missing required value, or a rule of the dataclass's `__post_init__` that does not hold.
    """
    tree = read_yaml(path)
    saved = _take_heading(schema, path, tree)
    return build(schema, [(str(path), convert(schema, tree, str(path), literal=saved)), *_parse(schema, overrides)])


def load_saved(schema: type[T], path: Path) -> T:
    """A config that `save_config` wrote, of this format or an older one."""
    tree = read_yaml(path)
    _take_heading(schema, path, tree)
    return build(schema, [(str(path), convert(schema, tree, str(path), literal=True))])


def save_config(config: Any, path: Path) -> None:
    """Writes a dataclass config as YAML: what it is, then every key."""
    path.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Any) -> str:
    """A dataclass config as YAML text, with its format and kind."""
    heading = {"format": FORMAT, "kind": config.KIND}
    return str(yaml.safe_dump(heading | dataclasses.asdict(config), sort_keys=False))


def _take_heading(schema: Any, path: Path, tree: Tree) -> bool:
    """Removes `format` and `kind`; gives keys that are newer than the format the values that were meant then. Returns
    whether they were there."""
    kind, text = tree.pop("kind", None), tree.pop("format", None)
    if kind is None and text is None:
        if schema.KIND in ("autoencoder", "flow"):  # never written by hand
            _add_older(schema, tree, 0)
        return False
    if kind != schema.KIND:
        raise UserError(f"{path}: is a config of kind {kind}, not {schema.KIND}")
    if text is None:  # written by hand
        return False
    if not (isinstance(text, str) and WHOLE.fullmatch(text) and 0 <= int(text) <= FORMAT):
        raise UserError(f"{path}: format {text}, this version reads up to {FORMAT}; install the version that wrote it")
    _add_older(schema, tree, int(text))
    return True


def _add_older(schema: Any, tree: Tree, format_: int) -> None:
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner = tree.get(field.name)
        if dataclasses.is_dataclass(hints[field.name]) and isinstance(inner, dict):
            _add_older(hints[field.name], inner, format_)
        elif inner is None and "before" in field.metadata and format_ < field.metadata["since"]:
            tree.setdefault(field.name, str(field.metadata["before"]))


def build(schema: type[T], sources: Sequence[tuple[str, Tree]]) -> T:
    """Merges converted trees in order over the schema's defaults."""
    merged: Any = _defaults(schema)  # type: ignore[arg-type]  # mypy: a class is not Hashable
    for origin, source in sources:
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(source))
        except (OmegaConfBaseException, TypeError) as error:
            raise UserError(f"{origin}: {_located(error)}") from None
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing and "[" in missing[0]:  # of an entry of a list, which is given whole
            raise UserError(f"{missing[0].partition('[')[0]} is not whole: {missing[0]} is not set")
        if missing:
            raise UserError(f"{missing[0]} is not set; give it as {missing[0]}=VALUE")
        result = OmegaConf.to_object(merged)
    except UserError as error:
        raise UserError(f"{_origin(sources, str(error))}: {error}") from None
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise UserError(f"{sources[0][0]}: {_located(error)}") from None
    assert isinstance(result, schema)
    return result


@cache
def _defaults(schema: type) -> Any:
    """Not to be changed: `merge` copies it. Making it anew is half the time of reading a config."""
    return OmegaConf.structured(schema)


def _origin(sources: Sequence[tuple[str, Tree]], message: str) -> str:
    """Where the value that a message is about comes from: the last argument for its key, or the file."""
    named = [origin for origin, _ in sources[1:] if message.startswith(origin.partition("=")[0] + " ")]
    return named[-1] if named else sources[0][0]


def _parse(schema: Any, overrides: Sequence[str]) -> list[tuple[str, Tree]]:
    """`key=value` arguments as trees."""
    parsed = []
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} is not key=value, for example train.batch_size=8")
        kind = _type_of(schema, name, text)
        tree: Any = value
        if optional(kind)[0] is not str:
            try:
                tree = yaml.load(value, _Text)
            except yaml.YAMLError as error:
                raise UserError(f"{text}: {_one_line(error)}") from None
            except RecursionError:
                raise UserError(f"{name}: is nested too deeply") from None
        tree = _convert(kind, tree, name, text, literal=True)
        for part in reversed(name.split(".")):
            tree = {part: tree}
        parsed.append((text, tree))
    return parsed


def _type_of(schema: Any, name: str, origin: str) -> Any:
    kind = schema
    for part in name.split("."):
        kind = optional(kind)[0]
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in hints or part not in {field.name for field in dataclasses.fields(kind)}:
            raise UserError(f"{origin}: unknown key {_nearest(schema, name)}")
        kind = hints[part]
    return kind


def convert(schema: Any, tree: Any, origin: str, *, literal: bool) -> Tree:
    """Text to the types of `schema`. With `literal`, `${` is text like any other."""
    found: Tree = _convert(schema, tree, "", origin, literal, schema)
    return found


def _convert(kind: Any, value: Any, name: str, origin: str, literal: bool, root: Any = None) -> Any:
    kind, may_be_null = optional(kind)
    if value is None and may_be_null:
        return None
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{origin}: {name} is {_shown(value)}; it holds keys of its own")
        hints, known = get_type_hints(kind), {field.name for field in dataclasses.fields(kind)}
        found = {}
        for part, inner in value.items():
            dotted = f"{name}.{part}" if name else part
            if part not in known:
                raise UserError(f"{origin}: unknown key {_nearest(root or kind, _leaf(dotted, inner))}")
            found[part] = _convert(hints[part], inner, dotted, origin, literal, root)
        return found
    if element(kind) is not kind:
        if not isinstance(value, list):
            raise UserError(f"{origin}: {name} is {_shown(value)}; give a list, for example [1, 2]")
        return [_convert(element(kind), one, name, origin, literal) for one in value]
    if not isinstance(value, str):
        raise UserError(f"{origin}: {name} is {_shown(value)}; {_wanted(kind)}")
    if value == MISSING or ("${" in value and not literal):
        return value
    try:
        return _read(kind, value)
    except ValueError:
        raise UserError(f"{origin}: {name} is {value!r}; {_wanted(kind)}") from None


def _read(kind: Any, text: str) -> Any:
    if kind is str:
        # OmegaConf would look another key up.
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    if kind is bool:
        if text.lower() not in (*TRUE, *FALSE):
            raise ValueError
        return text.lower() in TRUE
    if kind is int and WHOLE.fullmatch(text):
        return int(text.replace("_", ""))
    number = float(text.replace("_", ""))
    if kind is int:
        if not number.is_integer():  # of nan and infinity, too
            raise ValueError
        return int(number)
    return number


def _wanted(kind: Any) -> str:
    return {bool: "give true or false", int: "give a whole number", float: "give a number"}.get(kind, "give text")


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def differences(before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of every key that differs and may not change when a run is resumed."""
    found = []
    for leaf in leaves(type(now)):
        old, new = _value(before, leaf.name), _value(now, leaf.name)
        if old != new and not leaf.may_change:
            found.append((leaf.name, old, new))
    return found


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _nearest(schema: Any, name: str) -> str:
    """The key in quotes, and the known key nearest to it."""
    # "trian.images" should find "train.images", and "batch_size" should find "train.batch_size".
    known = {leaf.name for leaf in leaves(schema)}
    known |= {known_name.rsplit(".", 1)[0] for known_name in known if "." in known_name}
    best = max(sorted(known), key=lambda known_name: _similarity(name, known_name))
    return f"'{name}'" + (f"; did you mean '{best}'?" if _similarity(name, best) > 0.6 else "")


def _similarity(name: str, known: str) -> float:
    whole = difflib.SequenceMatcher(None, name, known).ratio()
    last = difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], known.rsplit(".", 1)[-1]).ratio()
    return max(whole, 0.9 * last)


def _leaf(name: str, value: Any) -> str:
    """An unknown section down to the first value in it: "trian" -> "trian.images"."""
    while isinstance(value, dict) and value:
        part = next(iter(value))
        name, value = f"{name}.{part}", value[part]
    return name


def _located(error: Exception) -> str:
    """The error in one line, after its key where that is known."""
    name = getattr(error, "full_key", None)
    return f"{name}: {_one_line(error)}" if name else _one_line(error)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
