"""What the user asks for: the reading of `targets` and of the specs in them."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import numpy as np
from jax.sharding import PartitionSpec

from .._arrays.check import (
    check_alpha,
    check_dropout,
    check_factor_dtype,
    check_flag,
    check_number,
    check_rank,
)
from ..init import Initialiser
from .habits import answers_peft
from .paths import LINEAR_LAYERS
from .presets import PRESETS
from .updates import read_update


def check_dora(x: Any) -> Any:
    """True, False, or a function that makes a `DoRA`."""
    if isinstance(x, bool | np.bool_):
        return bool(x)
    if not callable(x):
        raise TypeError(
            "`use_dora` must be True, False, or a function from a `LoraArray` to a "
            f"`DoRA`, got {x!r}."
        )
    return x


@dataclasses.dataclass(frozen=True)
class Adapt:
    """How one weight is adapted. What is `None` is as given to `loraify`.

    **Arguments:**

    - `rank`, `alpha`, `init_a`, `init_b`, `scale`, `dtype`, `dropout`: as for
        `LoraArray`.
    - `update`: the form of the update, as for `loraify`.
    - `use_dora`, `use_rslora`: as for `loraify`.
    - `spec`: how what trains of the weight lies on the mesh of the weight, said as the
        partition spec of a weight: by default as the weight does itself.
    - `rows`, `cols`: how many axes of the weight are rows, and how many are columns,
        counted from the end; those before them are batch, with separate factors for
        each index. By default that of the layer; one and one for an array outside a
        known layer.

    Other libraries keep a convolution's kernel as `(height, width, in, out)`. Its rows
    are then the three axes in front, and without being told so `loraify` would take the
    first two for batch:

    ```python
    targets={"conv.kernel": Adapt(rows=3, cols=1), "dense.kernel": True}
    ```

    There `b` takes inputs to rank, and `a` takes rank to outputs.

    **Raises:** `ValueError` or `TypeError` if a field is not what it should be.
    """

    rank: int | None = None
    alpha: Any = None
    init_a: Initialiser | None = None
    init_b: Initialiser | None = None
    scale: Any = None
    dtype: Any = None
    rows: int | None = None
    cols: int | None = None
    dropout: Any = None
    update: Any = None
    use_dora: bool | Callable | None = None
    use_rslora: bool | None = None
    spec: PartitionSpec | None = None

    def __post_init__(self):
        if self.rank is not None:
            check_rank(self.rank)
        check_alpha(self.alpha, 1)
        for name in ("init_a", "init_b"):
            init = getattr(self, name)
            if init is not None and not callable(init):
                raise TypeError(
                    f"`{name}` must be a function as in `jax.nn.initializers`, got "
                    f"{init!r}."
                )
        if self.init_a is not None and self.scale is not None:
            raise ValueError("Give either `init_a` or `scale`, not both.")
        if self.scale is not None:
            check_number("scale", self.scale)
        if self.dtype is not None:
            check_factor_dtype(self.dtype)
        if self.dropout is not None:
            object.__setattr__(self, "dropout", check_dropout(self.dropout))
        if self.use_dora is not None:
            check_dora(self.use_dora)
        if self.use_rslora is not None:
            check_flag("use_rslora", self.use_rslora)
        if self.spec is not None and not isinstance(self.spec, PartitionSpec):
            raise TypeError(
                f"`spec` must be a `jax.sharding.PartitionSpec`, got {self.spec!r}."
            )
        for name in ("rows", "cols"):
            n = getattr(self, name)
            if n is not None and (isinstance(n, bool) or not isinstance(n, int)):
                raise TypeError(f"`{name}` must be an integer, got {n!r}.")
            if n is not None and n < 1:
                raise ValueError(f"`{name}` must be at least 1, got {n!r}.")
        if self.update is not None:
            read_update(self.update).refuse(self.of_update)

    @property
    def of_update(self) -> dict[str, Any]:
        """What is said of the update, and not every form of one has."""
        names = "rank", "alpha", "init_a", "init_b", "scale", "dtype", "rows", "cols"
        return {name: getattr(self, name) for name in names}


setattr(Adapt, "__init__", answers_peft(Adapt.__init__))

Spec: TypeAlias = Adapt | int | bool | Literal["full", "freeze"] | None
Target: TypeAlias = type | str | re.Pattern | Callable[[str, Any], Spec]
# A list is of targets, or of pairs of a target and a spec.
Targets: TypeAlias = (
    Target
    | list[Any]
    | tuple[Any, ...]
    | set[Any]
    | frozenset[Any]
    | Mapping[Any, Spec]
)
# A spec, read.
Treatment: TypeAlias = Adapt | Literal["full", "freeze"]


class Entry(NamedTuple):
    """One of the targets, read."""

    target: Any  # types, a compiled pattern, a function, or the paths of modules
    spec: Treatment | None  # None for a function
    shown: str  # as the user wrote it
    is_name: bool = False
    preset: str | None = None  # of which the target is not known before the model is


def read_targets(targets: Any) -> list[Entry]:
    """`targets` as entries, the later of which win."""
    if targets is None:
        return [Entry(LINEAR_LAYERS, Adapt(), "the default targets")]
    if isinstance(targets, Mapping):
        entries = [_read_target(*item) for item in targets.items()]
    elif isinstance(targets, set | frozenset):  # As `target_modules` of PEFT may be.
        entries = [_read_target(target, True) for target in sorted(targets, key=repr)]
    elif isinstance(targets, list | tuple):
        entries = [_read_item(item) for item in targets]
    else:
        entries = [_read_target(targets, True)]
    if not entries:
        raise ValueError("`targets` is empty, so that nothing would be adapted.")
    return entries


def _read_item(item) -> Entry:
    if not isinstance(item, tuple):
        return _read_target(item, True)
    if len(item) != 2:
        raise TypeError(
            f"An entry of `targets` is a target or a pair (target, spec), got {item!r}."
        )
    return _read_target(*item)


def _read_target(target, spec) -> Entry:
    if isinstance(target, str) and target == "all-linear":
        return Entry(eqx.nn.Linear, read_spec(spec, repr(target)), repr(target))
    if isinstance(target, str) and target in PRESETS:
        read = read_spec(spec, repr(target))
        return Entry(frozenset(), read, repr(target), preset=target)
    if isinstance(target, type):
        return Entry(target, read_spec(spec, target.__name__), target.__name__)
    if isinstance(target, str | re.Pattern):
        pattern, is_name = read_pattern(target)
        shown = repr(target if isinstance(target, str) else target.pattern)
        return Entry(pattern, read_spec(spec, shown), shown, is_name)
    if isinstance(target, eqx.Module) and any(
        map(eqx.is_array, jax.tree.leaves(target))
    ):
        raise TypeError(
            "A target is the type of a layer, its name, or a function; got a layer "
            f"itself: {target!r}. `{type(target).__name__}` means all of its type."
        )
    if callable(target):
        if spec is not True:
            raise TypeError(
                f"A function says the spec itself, so that {spec!r} beside {target!r} "
                "in `targets` has no meaning."
            )
        return Entry(target, None, repr(target))
    raise TypeError(
        "A target must be a layer type, a name or a pattern, or a function of path and "
        f"array; got {target!r}. Pairs (target, spec) stand inside a list."
    )


ANY_PREFIX = r"(?:.*\.)?"  # Any number of segments, or none.


def read_pattern(target: str | re.Pattern) -> tuple[re.Pattern, bool]:
    """A name matches the last segments of a path, a regular expression all of it."""
    if isinstance(target, re.Pattern):
        return target, False
    if not target:
        raise ValueError("A target is the empty string, which names nothing.")
    if not set(target) & set(r"\*+?[](){}|^$"):
        return re.compile(ANY_PREFIX + re.escape(target), re.DOTALL), True
    try:
        return re.compile(target), False
    except re.error as e:
        raise ValueError(
            f"The target {target!r} is not a regular expression: {e}."
        ) from e


def read_spec(spec, where: str) -> Treatment:
    """A spec, of which `where` names the target or the array."""
    if isinstance(spec, bool | np.bool_) or spec is None:
        return Adapt() if spec else "freeze"
    if isinstance(spec, int):
        return Adapt(rank=spec)
    if isinstance(spec, Adapt):
        return spec
    if isinstance(spec, str) and spec in ("full", "freeze"):
        return spec
    raise TypeError(
        f"The spec of {where} must be a rank, an `Adapt`, True, False, 'full' or "
        f"'freeze'; got {spec!r}."
    )
