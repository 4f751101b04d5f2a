"""A TOML file as frozen dataclasses. What is wrong with it is named with its line."""

import dataclasses
import difflib
import os
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from ..._disk.files import AdapterError, refuse


_T = TypeVar("_T")
_MOST_BYTES, _MOST_LINES = 64_000, 1000


class Wrong(NamedTuple):
    """What is wrong with a key of a table, or with the table."""

    table: str
    key: str | None
    why: str


def number(default: Any = dataclasses.MISSING, *, least: Any = None, above: Any = None):
    """A field of a number that has a bound."""
    return dataclasses.field(default=default, metadata={"least": least, "above": above})


def read_toml(path: Path, kind: type[_T], check: Callable[[_T], Iterable[Wrong]]) -> _T:
    """A dataclass of dataclasses, one for each table of the file. A `Path` is seen from
    the folder of the file.

    **Arguments:**

    - `check`: what is wrong with values that are each of the right type.

    **Raises:** `FileNotFoundError`; `AdapterError`, which lists everything that is
    wrong with the lines where it stands.
    """
    text = _text(path)
    found = _parsed(path, text)
    tables, wrong = {}, [*_unknown("", found, kind)]
    for field, hint in _fields(kind):
        table = found.get(field.name, {})
        if not isinstance(table, dict):
            why = f"`{field.name}` has to be a table, [{field.name}]"
            wrong.append(Wrong(field.name, None, why))
            continue
        values, problems = _values(field.name, table, hint, path.parent)
        wrong += problems
        tables[field.name] = None if problems else hint(**values)
    _refuse(path, text, wrong)
    out = kind(**tables)
    _refuse(path, text, [*check(out)])
    return out


def _refuse(path: Path, text: str, wrong: list[Wrong]) -> None:
    """**Raises:** `AdapterError`, if there is anything."""
    if wrong:
        lines = _Lines(text)
        wrong = sorted(wrong, key=lines.order)
        problems = [f"{lines(x.table, x.key)}: {x.why}" for x in wrong]
        refuse(f"{path} cannot be used", problems, in_order=True)


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} to read a configuration of.")
    with path.open("rb") as file:
        found = file.read(_MOST_BYTES + 1)
    if len(found) > _MOST_BYTES or found.count(b"\n") > _MOST_LINES:
        limit = f"{_MOST_BYTES:,} bytes or {_MOST_LINES:,} lines"
        raise AdapterError(f"{path} is no configuration: it has more than {limit}.")
    try:
        return found.decode("utf-8-sig")  # Some editors put a mark at the beginning.
    except UnicodeDecodeError as e:
        line = found.count(b"\n", 0, e.start) + 1
        raise AdapterError(f"{path} is no TOML: line {line} is not UTF-8.") from e


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # Not all are of its own type.
        raise AdapterError(f"{path} is no TOML: {e}.") from e


def _fields(kind: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield field, hints[field.name]


def _unknown(table: str, found: dict[str, Any], kind: Any) -> Iterator[Wrong]:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in found.keys() - known:
        near = difflib.get_close_matches(key, known, 1)
        hint = f"`{near[0]}` is meant?" if near else f"there are {', '.join(known)}"
        what = f"[{table}] has no key `{key}`" if table else f"there is no table {key}"
        yield Wrong(table or key, key if table else None, f"{what}; {hint}")


def _values(
    table: str, found: dict[str, Any], kind: Any, folder: Path
) -> tuple[dict[str, Any], list[Wrong]]:
    values, wrong = {}, [*_unknown(table, found, kind)]
    for field, hint in _fields(kind):
        if field.name in found:
            try:
                values[field.name] = _value(found[field.name], hint, field, folder)
            except ValueError as e:
                why = f"`{field.name}` of [{table}] has to be {e}"
                got = f"{found[field.name]!r:.80}"
                wrong.append(Wrong(table, field.name, f"{why}, and is {got}"))
        elif field.default is dataclasses.MISSING:
            wrong.append(Wrong(table, None, f"[{table}] needs `{field.name}`"))
    return values, wrong


def _value(x: Any, hint: Any, field: dataclasses.Field, folder: Path) -> Any:
    """**Raises:** `ValueError`, which says what it has to be."""
    if type(None) in typing.get_args(hint):  # `None` is to leave it out.
        return _value(x, typing.get_args(hint)[0], field, folder)
    if typing.get_origin(hint) is Literal:
        if x not in (known := typing.get_args(hint)):
            raise ValueError("one of " + ", ".join(repr(y) for y in known))
        return x
    if hint is bool:
        if not isinstance(x, bool):
            raise ValueError("true or false")
        return x
    if hint in (int, float):
        return _number(x, hint, field)
    if hint is Path and isinstance(x, str) and x and "\0" not in x:
        return folder / os.path.expanduser(x)
    is_list = isinstance(x, list) and x and all(isinstance(y, str) and y for y in x)
    if hint == tuple[str, ...] and is_list:
        return tuple(x)
    raise ValueError("a path" if hint is Path else "a list of names")


def _number(x: Any, hint: type, field: dataclasses.Field) -> Any:
    least, above = field.metadata.get("least"), field.metadata.get("above")
    bound = "" if least is None else f" of at least {least}"
    bound = bound if above is None else f" above {above}"
    is_number = isinstance(x, int | hint) and not isinstance(x, bool)
    if (
        not is_number
        or not abs(x) < 2**63  # Nor is it NaN.
        or (least is not None and x < least)
        or (above is not None and x <= above)
    ):
        raise ValueError(f"{'an integer' if hint is int else 'a number'}{bound}")
    return hint(x)


class _Lines:
    """Where keys stand. The parser does not tell; but a file that ends before a key is
    a file as well, and has not the key."""

    def __init__(self, text: str):
        self._first: dict[tuple[str, ...], int] = {}
        # Of TOML's lines; Python knows more characters that end one.
        lines, begins = [f"{line}\n" for line in text.split("\n")], 1
        for end in range(1, len(lines) + 1):
            try:
                found = tomllib.loads("".join(lines[:end]))
            except tomllib.TOMLDecodeError:
                continue  # Within a value of several lines.
            for table, keys in found.items():
                self._first.setdefault((table,), begins)
                for key in keys if isinstance(keys, dict) else ():
                    self._first.setdefault((table, key), begins)
            begins = end + 1

    def _line(self, table: str, key: str | None) -> int:
        here = self._first.get((table, *([key] if key else [])))
        return here or self._first.get((table,), 0)

    def __call__(self, table: str, key: str | None) -> str:
        line = self._line(table, key)
        return f"line {line}" if line else "at the end"

    def order(self, wrong: Wrong) -> int:
        return self._line(wrong.table, wrong.key) or _MOST_LINES + 1
