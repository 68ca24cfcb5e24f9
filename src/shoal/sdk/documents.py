"""A YAML document read into strict msgspec structs, with an error that names file, line and field.

The structs are the only declaration of a field: its name, type, bounds, default and meaning (the docstring below it).
`read_document`, `fields_of`, `json_schema` and `explain` all follow from them.

- A scalar is read by the type of its field, not by what YAML 1.1 makes of it: `name: no` is the text `no`, `1e-3` is a
  number, and `010` is ten.
- A quantity is written with its unit and stored as a plain number: a field ending in `_s` or `_ms` is a duration, in
  `_bytes` an amount; that ending is not part of its name in the document. `Meta(extra={"quantity": "count"})` (`2M`)
  and `"bytes_per_s"` say so where the name does not.
- `Meta(extra={"flat": True})` on a struct field puts the fields of that struct beside it; a field of the outer struct
  hides one of the same name.
- Anchors, aliases, tags and duplicate keys are refused: a job file says each thing once.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import msgspec
import yaml

from shoal.errors import BadInput
from shoal.quantities import (
    BadQuantity,
    parse_bytes,
    parse_bytes_per_s,
    parse_count,
    parse_duration_s,
)
from shoal.quantities.money import format_money, format_price, parse_money, parse_price

DOCUMENT_MAX_BYTES = 256 * 1024
DEPTH_MAX = 8
LIST_MAX = 1024
"""Entries of a list."""
SHOWN_CHARACTERS = 60
"""How much of a text a sentence repeats."""


class BadDocument(BadInput):
    """A document cannot be read, is not YAML, or is not built as one."""

    code = "SH-120"


class UnknownField(BadInput):
    """A document has a field that does not exist, or has one twice."""

    code = "SH-121"


class BadValue(BadInput):
    """A field's value is missing, of the wrong type, or out of bounds."""

    code = "SH-122"


T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True)
class Document(Generic[T]):
    """What was read, and where each field that is there stands."""

    value: T
    name: str
    """The file's name, for sentences."""
    lines: Mapping[str, int]
    """Line by path, such as `rounds.lag`; counted from 1."""

    def at(self, path: str) -> str:
        """How a sentence about a field begins: `job.yaml line 7: rounds.lag`."""
        return f"{self.name} line {self.lines[path]}: {path}" if path in self.lines else f"{self.name}: {path}"


@dataclass(frozen=True)
class Field:
    """A field as it is written in a document."""

    path: str
    """`rounds.lag`; for the fields of a list element or of the document itself, the plain name."""
    name: str
    attribute: str
    """Its name in the struct."""
    kind: Any
    quantity: str | None
    default: Any
    required: bool
    meaning: str
    flat: str | None
    """The attribute of the struct it is stored in, where that struct's fields stand beside it."""

    @property
    def section(self) -> type[msgspec.Struct] | None:
        return _section_of(self.kind)


# --- fields from structs --------------------------------------------------------------------------------------------

_ENDINGS = {"_ms": "ms", "_s": "s", "_bytes": "bytes"}
_MS_UNITS = {" d": 86_400_000, " h": 3_600_000, " min": 60_000, " s": 1000, " ms": 1}
_BYTE_UNITS = {" TiB": 1 << 40, " GiB": 1 << 30, " MiB": 1 << 20, " KiB": 1 << 10, " B": 1}
_COUNT_UNITS = {"B": 10**9, "M": 10**6, "k": 10**3, "": 1}
_QUANTITIES: Mapping[str, tuple[Callable[[str], float], Callable[[float], str], str]] = {
    "ms": (lambda text: parse_duration_s(text) * 1000, lambda value: _in_units(value, _MS_UNITS), "a duration"),
    "s": (parse_duration_s, lambda value: _in_units(value * 1000, _MS_UNITS), "a duration"),
    "bytes": (parse_bytes, lambda value: _in_units(value, _BYTE_UNITS), "an amount of bytes"),
    "bytes_per_s": (
        parse_bytes_per_s,
        lambda value: f"{_in_units(value, {' B': 1})}/s",
        "bytes per second",
    ),
    "count": (parse_count, lambda value: _in_units(value, _COUNT_UNITS), "a count"),
    "price": (parse_price, lambda value: format_price(round(value)), "a price"),
    "money": (parse_money, lambda value: format_money(round(value)), "an amount of money"),
}
"""How each kind of quantity is read, printed, and called."""
_EXAMPLES = {
    "ms": "80 ms", "s": "2 min", "bytes": "16 GiB", "bytes_per_s": "100 kB/s", "count": "2M", "price": "0.35/h",
    "money": "2.50",
}  # fmt: skip


def _in_units(value: float, units: Mapping[str, int]) -> str:
    """As one would write it: in the largest unit in which it is a whole number, else in the smallest."""
    unit = next((unit for unit, size in units.items() if value and value % size == 0), None)
    smallest = list(units)[-1]
    return f"{value / units[unit]:.0f}{unit}" if unit is not None else f"{value:g}{smallest}"


def _extra(kind: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if get_origin(kind) is Annotated:
        for meta in get_args(kind)[1:]:
            if isinstance(meta, msgspec.Meta):
                found |= meta.extra or {}
    for option in get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ():
        found |= _extra(option)
    return found


def _bare(kind: Any) -> Any:
    return _bare(get_args(kind)[0]) if get_origin(kind) is Annotated else kind


def _section_of(kind: Any) -> type[msgspec.Struct] | None:
    bare = _bare(kind)
    return bare if isinstance(bare, type) and issubclass(bare, msgspec.Struct) else None


@cache
def fields_of(kind: type[msgspec.Struct], prefix: str = "") -> tuple[Field, ...]:
    """The fields of a struct as a document has them, sections unopened."""
    meanings = _meanings(kind)
    own: list[Field] = []
    flattened: list[Field] = []
    for info in msgspec.structs.fields(kind):
        extra = _extra(info.type)
        if extra.get("flat"):
            flattened += [dataclasses.replace(inner, flat=info.name) for inner in fields_of(_bare(info.type), prefix)]
            continue
        ending = next((end for end in _ENDINGS if info.name.endswith(end)), None)
        quantity = extra.get("quantity") or (_ENDINGS[ending] if ending else None)
        name = info.name.removesuffix(ending) if ending else info.name
        if info.default_factory is not msgspec.NODEFAULT:
            default = info.default_factory()
        else:
            default = None if info.default is msgspec.NODEFAULT else info.default
        own.append(
            Field(
                path=prefix + name,
                name=name,
                attribute=info.name,
                kind=info.type,
                quantity=quantity,
                default=default,
                required=info.required,
                meaning=meanings.get(info.name) or _section_meaning(info.type),
                flat=None,
            )
        )
    names = {field.name for field in own}
    return (*own, *(field for field in flattened if field.name not in names))


def all_fields(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[Field]:
    """The fields of a struct and of its sections, in order; a section comes before its fields."""
    for field in fields_of(kind, prefix):
        yield from _all(field)


def _all(field: Field) -> Iterator[Field]:
    yield field
    if field.section is not None:
        yield from all_fields(field.section, f"{field.path}.")


def _section_meaning(kind: Any) -> str:
    bare = _bare(kind)
    is_section = isinstance(bare, type) and issubclass(bare, msgspec.Struct)
    return " ".join((inspect.getdoc(bare) or "").split()) if is_section else ""


@cache
def _meanings(kind: type) -> dict[str, str]:
    """The docstrings below a class's fields. Empty where the source is not installed."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):
        return {}
    found: dict[str, str] = {}
    statements = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    for statement, after in itertools.pairwise(statements):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[statement.target.id] = " ".join(after.value.value.split())
    return found


# --- types in words -------------------------------------------------------------------------------------------------


def _options(kind: Any) -> list[Any]:
    """The alternatives of a type, unions opened and None left out."""
    if get_origin(kind) in (Union, types.UnionType):
        return [option for part in get_args(kind) for option in _options(part)]
    if get_origin(kind) is Annotated and get_origin(get_args(kind)[0]) in (Union, types.UnionType):
        return _options(get_args(kind)[0])
    return [] if kind is type(None) else [kind]


def _takes_none(kind: Any) -> bool:
    bare = _bare(kind)
    return get_origin(bare) in (Union, types.UnionType) and type(None) in get_args(bare)


def _words(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} or {values[-1]}"


def describe(field: Field) -> str:
    """What may stand in a field: `auto or an integer from 1 to 4096`."""
    return _words([_describe(option, field.quantity) for option in _options(field.kind)])


def _describe(kind: Any, quantity: str | None) -> str:
    bare = _bare(kind)
    if get_origin(bare) is Literal:
        return _words([str(value) for value in get_args(bare)])
    if isinstance(bare, type) and issubclass(bare, Enum):
        return _words([str(option.value) for option in bare])
    if get_origin(bare) is tuple:
        return f"{_describe(get_args(bare)[0], quantity)}, or a list of such"
    bounds = _bounds(kind, quantity)
    if quantity is not None:
        return f"{_QUANTITIES[quantity][2]} (such as {_EXAMPLES[quantity]}){bounds}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a text"}.get(bare, "a section") + bounds


def _longest(kind: Any) -> int:
    """How many entries a list may have."""
    lengths = [meta.max_length for meta in get_args(kind)[1:] if isinstance(meta, msgspec.Meta) and meta.max_length]
    return min(lengths, default=LIST_MAX)


_UNBOUNDED = 1 << 30
"""An upper bound from here on is there for the decoder, not for the reader."""


def _bounds(kind: Any, quantity: str | None) -> str:
    low: str | None = None
    high: str | None = None
    shown = _QUANTITIES[quantity][1] if quantity else _number
    for meta in get_args(kind)[1:] if get_origin(kind) is Annotated else ():
        if not isinstance(meta, msgspec.Meta):
            continue
        low = shown(meta.ge) if meta.ge is not None else f"above {shown(meta.gt)}" if meta.gt is not None else low
        if meta.le is not None and meta.le < _UNBOUNDED:
            high = shown(meta.le)
        if meta.pattern is not None:
            return f" that matches {meta.pattern}"
    if low is None and high is None:
        return ""
    if low is None:
        return f" up to {high}"
    above = low.startswith("above")
    if high is None:
        return f" {low}" if above else f" of at least {low}"
    return f" {low} and up to {high}" if above else f" from {low} to {high}"


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_default(field: Field) -> str:
    """A field's default as one would write it."""
    value = field.default
    if field.required:
        return "(required)"
    if value is None:
        return "(not set)"
    if field.quantity is not None and isinstance(value, int | float):
        return _QUANTITIES[field.quantity][1](value)
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return f"[{', '.join(str(part) for part in value)}]"
    return _number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


# --- reading --------------------------------------------------------------------------------------------------------

_INTEGER = re.compile(r"[+-]?[0-9][0-9_]*\Z")
_FLOAT = re.compile(r"[+-]?([0-9][0-9_]*(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\Z")
_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])_(?=[0-9])")
_NULLS = ("", "~", "null", "Null", "NULL")


def read_document(text: bytes, kind: type[T], name: str) -> Document[T]:
    """Read `text`, a YAML document called `name`, as a `kind`. Raises BadDocument, UnknownField, BadValue."""
    lines: dict[str, int] = {}
    root = _parse(text, name)
    if root is None:
        raise BadDocument(f"{name} is empty; see `shoal train --help` for what a job file says.")
    if not isinstance(root, yaml.MappingNode):
        raise BadDocument(f"{name} line {_line(root)}: a job file is a list of `field: value` lines, not this.")
    reader = _Reader(name, kind, lines)
    value: T = reader.mapping(root, kind, "")
    return Document(value, name, lines)


def _parse(text: bytes, name: str) -> yaml.Node | None:
    if len(text) > DOCUMENT_MAX_BYTES:
        raise BadDocument(f"{name} has {len(text)} bytes; a job file has at most {DOCUMENT_MAX_BYTES}.")
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise BadDocument(f"{name} line {line}: this is not UTF-8 text; save the file as UTF-8.") from error
    try:
        depth = 0
        for event in yaml.parse(decoded, Loader=yaml.SafeLoader):
            line = _line(event)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise BadDocument(f"{name} line {line}: anchors (&) and aliases (*) are not used in job files.")
            if (tag := getattr(event, "tag", None)) is not None:
                raise BadDocument(f"{name} line {line}: tags ({tag}) are not used in job files.")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH_MAX:
                raise BadDocument(f"{name} line {line}: nested more than {DEPTH_MAX} deep; no field of a job is.")
        node: yaml.Node | None = yaml.compose(decoded, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = decoded.count("\n", 0, error.position) + 1
        raise BadDocument(f"{name} line {line}: a control character (#x{error.character:02x}) stands here.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).split())
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise BadDocument(f"{name}{where}: this is not YAML: {problem}. Check indentation, colons, quotes.") from error
    return node


def _line(where: yaml.Node | yaml.Event) -> int:
    return 1 if where.start_mark is None else where.start_mark.line + 1


@dataclass
class _Reader:
    name: str
    root: type[msgspec.Struct]
    lines: dict[str, int]

    def mapping(self, node: yaml.Node, kind: type[msgspec.Struct], path: str) -> Any:
        fields = {field.name: field for field in fields_of(kind, f"{path}." if path else "")}
        values: dict[str, Any] = {}
        flat: dict[str, dict[str, Any]] = {}
        for key, value in self._entries(node, path):
            field = fields.get(key.value)
            if field is None:
                raise UnknownField(f"{self.name} line {_line(key)}: {self._unknown(key.value, path, list(fields))}")
            if field.path in self.lines:
                raise UnknownField(
                    f"{self.name} line {_line(key)}: {field.path} stands in line {self.lines[field.path]} already; "
                    "say it once."
                )
            self.lines[field.path] = _line(key)
            target = values if field.flat is None else flat.setdefault(field.flat, {})
            target[field.attribute] = self._value(value, field)
        for field in fields.values():
            if field.required and field.path not in self.lines:
                missing = next((inner for inner in _all(field) if inner.required and inner.section is None), field)
                raise BadValue(f"{self.name}: {missing.path} is missing; write {describe(missing)}.")
        for info in msgspec.structs.fields(kind):
            if info.name in flat:
                values[info.name] = _bare(info.type)(**flat[info.name])
        return kind(**values)

    def _entries(self, node: yaml.Node, path: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        if isinstance(node, yaml.ScalarNode) and not node.style and node.value in _NULLS:
            return
        if not isinstance(node, yaml.MappingNode):
            raise BadValue(f"{self.name} line {_line(node)}: {path} is a section; write its fields below it, indented.")
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise BadDocument(f"{self.name} line {_line(key)}: a field's name is a plain word, not this.")
            yield key, value

    def _unknown(self, name: str, path: str, known: list[str]) -> str:
        shown = f"{path}.{name}" if path else name
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        if near:
            return f"{shown} is not a field; did you mean {near[0]}?"
        elsewhere = [field.path for field in all_fields(self.root) if field.name == name]
        if elsewhere:
            return f"{shown} is not a field; did you mean {elsewhere[0]}?"
        return f"{shown} is not a field; there are {', '.join(known)}."

    def _value(self, node: yaml.Node, field: Field) -> Any:
        if field.section is not None:
            return self.mapping(node, field.section, field.path)
        options = _options(field.kind)
        lists = [option for option in options if get_origin(_bare(option)) is tuple]
        if lists:
            element = get_args(_bare(lists[0]))[0]
            nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
            most = min(LIST_MAX, _longest(lists[0]))
            if len(nodes) > most:
                raise BadValue(f"{self.name} line {_line(node)}: {field.path} has {len(nodes)} entries; at most {most} "
                               "may stand here.")  # fmt: skip
            if (section := _section_of(element)) is not None:
                return tuple(self.mapping(part, section, f"{field.path}[{at}]") for at, part in enumerate(nodes, 1))
            return tuple(self._checked(self._scalar(part, field, [element]), part, field, element) for part in nodes)
        if isinstance(node, yaml.ScalarNode) and not node.style and node.value in _NULLS and _takes_none(field.kind):
            return None
        return self._checked(self._scalar(node, field, options), node, field, field.kind)

    def _scalar(self, node: yaml.Node, field: Field, options: list[Any]) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise self._bad(node, field, "a list" if isinstance(node, yaml.SequenceNode) else "a section")
        text: str = node.value
        plain = not node.style
        if plain and text in _NULLS:
            raise BadValue(f"{self.name} line {_line(node)}: {field.path} has no value; write {describe(field)}.")
        for option in options:
            try:
                value = _read_scalar(text, plain, _bare(option), field.quantity)
            except BadQuantity as error:
                raise BadValue(f"{self.name} line {_line(node)}: {field.path}: {error}") from error
            if value is not None:
                return value
        raise self._bad(node, field, repr(text) if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]!r}...")

    def _checked(self, value: Any, node: yaml.Node, field: Field, kind: Any) -> Any:
        try:
            return msgspec.convert(value, kind, strict=True)
        except msgspec.ValidationError as error:
            if isinstance(value, str):
                long = f"one of {len(value)} characters"
                found = "an empty one" if not value else repr(value) if len(value) <= SHOWN_CHARACTERS else long
            else:
                found = _QUANTITIES[field.quantity][1](value) if field.quantity else repr(value)
            raise self._bad(node, field, found) from error

    def _bad(self, node: yaml.Node, field: Field, found: str) -> BadValue:
        return BadValue(f"{self.name} line {_line(node)}: {field.path} must be {describe(field)}, not {found}.")


def _read_scalar(text: str, plain: bool, kind: Any, quantity: str | None) -> Any:
    """A scalar as a `kind`, or None when it is none. Bounds are checked later. Raises BadQuantity."""
    if get_origin(kind) is Literal:
        return next((option for option in get_args(kind) if str(option) == text), None)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return next((option for option in kind if option.value == text), None)
    if kind is str:
        return text
    if quantity is not None:
        if text.lstrip().startswith("-"):
            return None
        number = _QUANTITIES[quantity][0](_BETWEEN_DIGITS.sub("", text) if plain else text)
        return round(number) if kind is int else number
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower()) if plain else None
    if kind is int and plain and len(text) <= 40 and _INTEGER.match(text):
        return int(text.replace("_", ""))
    if kind is float and plain and len(text) <= 40 and _FLOAT.match(text):
        number = float(text.replace("_", ""))
        return number if math.isfinite(number) else None
    return None


# --- for editors and people -----------------------------------------------------------------------------------------


def json_schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of the documents that `read_document` accepts, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_object_schema(kind, "")}


def _object_schema(kind: type[msgspec.Struct], prefix: str) -> dict[str, Any]:
    fields = fields_of(kind, prefix)
    schema: dict[str, Any] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {field.name: _field_schema(field) for field in fields},
    }
    required = [field.name for field in fields if field.required]
    return schema | ({"required": required} if required else {})


def _field_schema(field: Field) -> dict[str, Any]:
    if field.section is not None:
        schema = _object_schema(field.section, f"{field.path}.") | {"type": ["object", "null"]}
    else:
        choices = [choice for option in _options(field.kind) for choice in _option_schemas(option, field.quantity)]
        choices += [{"type": "null"}] if _takes_none(field.kind) else []
        schema = choices[0] if len(choices) == 1 else {"anyOf": choices}
        if not field.required and field.default is not None:
            schema = schema | {"default": msgspec.json.decode(msgspec.json.encode(field.default))}
    return schema | ({"description": field.meaning} if field.meaning else {})


def _option_schemas(kind: Any, quantity: str | None) -> list[dict[str, Any]]:
    bare = _bare(kind)
    if get_origin(bare) is tuple:
        element = get_args(bare)[0]
        if (section := _section_of(element)) is not None:
            one = _object_schema(section, "")
            return [{"type": "array", "items": one, "maxItems": _longest(kind)}, one]
        return [_plain_schema(kind), *_option_schemas(element, quantity)]
    if quantity is not None and bare in (int, float):
        return [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^\s*[0-9.]+([eE][0-9]+)?\s*\S*\s*$"}]
    if isinstance(bare, type) and issubclass(bare, Enum):
        return [{"enum": [option.value for option in bare]}]
    return [_plain_schema(kind)]


def _plain_schema(kind: Any) -> dict[str, Any]:
    return {key: value for key, value in msgspec.json.schema(kind).items() if key not in ("title", "$defs")}
