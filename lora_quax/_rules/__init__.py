"""What each primitive does to the arrays, by family. Importing registers the rules."""

from . import (
    _conv as _conv,
    _dot as _dot,
    _join as _join,
    _layout as _layout,
    _lookup as _lookup,
    _placement as _placement,
    _scalar as _scalar,
)
