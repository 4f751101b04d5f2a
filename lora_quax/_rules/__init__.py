"""What each primitive does to the arrays, by family. Importing registers the rules."""

from . import (
    conv as conv,
    dot as dot,
    join as join,
    layout as layout,
    lookup as lookup,
    placement as placement,
    quax_gaps as quax_gaps,
    scalar as scalar,
    scaled as scaled,
)
