"""What the fingerprint in a file of ours tells of a base: whether it is the one that
was adapted, and which of its tensors are transposed."""

import itertools
from typing import NamedTuple

from .._disk.files import AdapterError, open_tensors
from .._disk.fingerprint import checked, fingerprint_of, may_be_same
from .._model.names import Namer
from .._model.paths import named
from .content import Content
from .merge_plan import Tensors


class Known(NamedTuple):
    turned: dict[str, bool]  # tensor -> whether it is kept transposed
    differ: list[str]  # in what another base is another one


def compare(content: Content, tensors: Tensors, namer: Namer) -> Known:
    """Of the weights that are one tensor each.

    **Raises:** `AdapterError` if what the file has is no fingerprint.
    """
    try:
        before = checked(content.base or {})
    except TypeError as e:
        raise AdapterError(f"{content.path}: {e}.") from e
    out = Known({}, [])
    called = {namer(path): path for path in content.updates if path in before}
    called = {name: path for name, path in called.items() if name in tensors}
    by_file = lambda name: tensors[name].file
    for path, names in itertools.groupby(sorted(called, key=by_file), by_file):
        with open_tensors(path) as file:
            for name in names:
                x, was = file.view(name), before[called[name]]
                ways = [(False, x), *([(True, x.T)] if x.ndim == 2 else [])]
                fits = [turned for turned, y in ways if _fits(was, y)]
                if len(fits) == 1:
                    out.turned[name] = fits[0]
                elif not fits:
                    # Its shape the plan compares, as the files have it.
                    out.differ.append(f"{named(called[name])} has other numbers")
    return out


def _fits(was: str, x) -> bool:
    return may_be_same(was, fingerprint_of(x))
