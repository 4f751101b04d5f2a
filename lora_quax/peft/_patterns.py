"""The patterns of a configuration, matched in bounded time.

They are written for Python's `re`, whose search may take for ever. RE2 takes time in
proportion to pattern and text; it knows no look-around and no references back. Of most
patterns, which are names, there may be as many as there are layers: they are looked up.
"""

import functools as ft
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import re2


_MOST = 1000  # Patterns that are searched for one by one.
_LONGEST = 100_000  # Characters of one of them.
_LITERAL = re.compile(r"(\^?)((?:[\w-]|\\[^\w\s]|\.)*)")
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False
_OPTIONS.max_mem = 1 << 26


@ft.lru_cache(maxsize=4 * _MOST)
def compiled(pattern: str) -> Any:
    """**Raises:** `ValueError` if it is no pattern, or none that RE2 has."""
    if len(pattern) > _LONGEST:
        raise ValueError(f"it has {len(pattern):,} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise ValueError(f"it is not a regular expression: {e}") from e
    # What both have, and means something else in each.
    if "[:" in pattern or "{," in pattern:
        raise ValueError("it has '[:' or '{,', which not all engines read alike")
    try:
        return re2.compile(pattern, _OPTIONS)
    except re2.error as e:
        raise ValueError(
            f"it is not one that can be matched in bounded time: {e}. Name the modules "
            "one by one, or say it without look-around, references and large counts"
        ) from e


class Ends:
    """Names, each of which stands for every path that ends in it."""

    def __init__(self, names: Iterable[str]):
        self.names = frozenset(names)

    def match(self, path: str) -> bool:
        return any(end in self.names for end in ends(path))


def ends(path: str) -> list[str]:
    """What a path ends in, by whole segments, itself among them."""
    segments = path.split(".")
    return [".".join(segments[i:]) for i in range(len(segments))]


class Whole:
    """A regular expression for whole paths; or names, with a `|` in between."""

    def __init__(self, pattern: str):
        """**Raises:** as `compiled`."""
        parts = [_LITERAL.fullmatch(part) for part in pattern.split("|")]
        literal = all(part and not part[1] and not _dots(part[2]) for part in parts)
        self.names = {_plain(part[2]) for part in parts if part} if literal else None
        self.pattern = None if literal else compiled(pattern)

    def match(self, path: str) -> bool:
        if self.pattern is None:
            return path in (self.names or ())
        return self.pattern.fullmatch(path) is not None


class Table:
    """Values by patterns, of which the first that matches the end of a path decides.

    By PEFT's rule a pattern is matched as `(.*\\.)?(pattern)$`.
    """

    def __init__(self, patterns: Mapping[str, Any]):
        """**Raises:** as `compiled`; `ValueError` for too many."""
        self.values = list(patterns.values())
        # Names by their length, and by where they have a dot that stands for anything.
        self.names: dict[int, dict[tuple, dict[tuple[str, bool], int]]] = {}
        self.others: list[tuple[int, Any]] = []
        for i, pattern in enumerate(patterns):
            if match := _LITERAL.fullmatch(pattern):
                name, dots = _plain(match[2]), _dots(match[2])
                group = self.names.setdefault(len(name), {}).setdefault(dots, {})
                group.setdefault((_masked(name, dots), match[1] == "^"), i)
            else:
                self.others.append((i, compiled(rf"(.*\.)?({pattern})$")))
            # Asked at once, for to compile a pattern takes its time.
            if len(self.others) + sum(map(len, self.names.values())) > _MOST:
                raise ValueError(f"there are more than {_MOST} of kinds of their own")

    def find(self, name: str, default: Any) -> Any:
        found = [i for end in ends(name) for i in self._named(end, end == name)]
        limit = min(found, default=len(self.values))
        for i, pattern in self.others:
            if i > limit:
                break
            if pattern.match(name):
                limit = i
                break
        return self.values[limit] if limit < len(self.values) else default

    def _named(self, end: str, is_whole: bool) -> list[int]:
        groups = self.names.get(len(end), {})
        keys = [
            (group, (_masked(end, dots), anchored))
            for dots, group in groups.items()
            for anchored in ((False, True) if is_whole else (False,))
        ]
        return [group[key] for group, key in keys if key in group]


def _plain(literal: str) -> str:
    return re.sub(r"\\(.)", r"\1", literal)


def _dots(literal: str) -> tuple[int, ...]:
    """Where the name has a dot that stands for any character."""
    characters = re.findall(r"\\?.", literal)
    return tuple(i for i, x in enumerate(characters) if x == ".")


def _masked(name: str, dots: tuple[int, ...]) -> str:
    out = list(name)
    for i in dots:
        out[i] = "."
    return "".join(out)
