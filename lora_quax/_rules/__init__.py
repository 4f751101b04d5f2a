"""What each primitive does to the arrays, by family. Importing registers the rules."""

from . import (
    calls as calls,
    collectives as collectives,
    conv as conv,
    dot as dot,
    dropout as dropout,
    equinox_internal as equinox_internal,
    hi as hi,
    join as join,
    layout as layout,
    lookup as lookup,
    loops as loops,
    placement as placement,
    quantised as quantised,
    quax_trace as quax_trace,
    scalar as scalar,
    scaled as scaled,
    solves as solves,
)
