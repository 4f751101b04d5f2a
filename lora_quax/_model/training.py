"""Which leaves train, and gradients of those alone.

They are found by the role of the field that holds them, never by their identity, so
that abstract and partitioned trees read the same.
"""

import functools as ft
import warnings
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._arrays.base import BASE, base_of, FROZEN, is_adapted, roles
from .paths import dotted, named


def labels(tree: PyTree) -> PyTree:
    """What each leaf is, as the labels of `optax.multi_transform`.

    LoRA+ (Hayou et al., arXiv 2402.12354) gives the factor `b` a larger step, and
    LoRA-FA (Zhang et al., arXiv 2308.03303) does not train `a`:

    ```python
    params, _ = lora_quax.partition(model)
    slow, fast = optax.adam(1e-4), optax.adam(16e-4)
    lora_plus = {"a": slow, "b": fast, "full": slow}
    optim = optax.multi_transform(lora_plus, lora_quax.labels)
    opt_state = optim.init(params)
    ```

    For the whole model, rather than `partition`'s first part, add
    `"frozen": optax.set_to_zero()`.

    **Arguments:**

    - `tree`: a model, abstract or not, or the part of one that trains.

    **Returns:** the same tree with, in place of each leaf, one of

    - `"a"`, `"b"`: a factor of a low-rank update;
    - `"full"`: an array that trains as a whole: the value of a `FullArray`, or the base
        of a `LoraArray` with `stop_gradient=False`;
    - `"scale"`: that of a `ScaledArray`, or whatever another form of adaptation calls
        what trains of it;
    - `"frozen"`: anything else.
    """
    return jax.tree.map(lambda name: FROZEN if name == BASE else name, roles(tree))


def trainable(model: PyTree) -> PyTree:
    """Which leaves of a model train, as a filter spec of Equinox.

    Weight decay reaches whatever an optimiser is given, be its gradient zero or not. If
    the whole model is given to it, as in a loop that knows nothing of LoRA, this is the
    mask that keeps the frozen weights as they are. It masks the decay alone: of an
    optimiser that moves what has no gradient by other means, such as noise, `partition`
    keeps them.

    ```python
    optim = optax.adamw(1e-4, mask=lora_quax.trainable)
    ```

    **Arguments:**

    - `model`: a model, abstract or not, or a part of one, or its gradients.

    **Returns:** the same tree with `True` at the factors, the values of `FullArray`s
    and the bases that are not frozen, and `False` at every other leaf.
    """
    return jax.tree.map(lambda label: label != FROZEN, labels(model))


def partition(model: PyTree) -> tuple[PyTree, PyTree]:
    """A model as the part that trains and the part that does not.

    **Arguments:**

    - `model`: a model with adapted weights.

    **Returns:** two trees of the model's structure, each with `None` for the leaves of
    the other. `equinox.combine` puts them together.

    **Raises:** `ValueError` if nothing in the model trains. Warns of factors of 16
    bits beside a base of 16 bits, as a cast of the adapted model leaves them.
    """
    return _partition(model)


def _partition(model: PyTree) -> tuple[PyTree, PyTree]:
    """As `partition`; called by it and by what the user calls in its place."""
    spec = trainable(model)
    if not any(jax.tree.leaves(spec)):
        raise ValueError(
            "Nothing in the model trains: it has no low-rank update and no array "
            "trained in full. Call `lora_quax.loraify` first; and give the model, or a "
            "tuple of what trains, as the first argument."
        )
    if narrow := _narrow(model):
        path, dtype = narrow[0]
        more = f" and {len(narrow) - 1} more" if len(narrow) > 1 else ""
        warnings.warn(
            f"The factors of {named(path)}{more} are {dtype}, in which small steps are "
            "lost. `loraify` makes them float32, beside a base of 16 bits too. If the "
            "adapted model was cast, cast the model first and adapt it then. If its "
            "`dtype` said so, this warning can be filtered by its beginning.",
            stacklevel=3,
        )
    return eqx.partition(model, spec)


def _narrow(model: PyTree) -> list[tuple[str, str]]:
    """The weights of which base and factors are of 16 bits, and the type of these."""
    leaves = jtu.tree_flatten_with_path(model, is_leaf=is_adapted)[0]
    found = []
    for keys, x in leaves:
        base = base_of(x) if is_adapted(x) else None
        dtype = getattr(base, "dtype", None)
        if dtype is None or jnp.dtype(dtype).itemsize > 2:
            continue
        # What has no role but "full" trains in the type of the base, as it would alone.
        types = [
            jnp.dtype(leaf.dtype)
            for leaf, name in zip(jtu.tree_leaves(x), jtu.tree_leaves(roles(x)))
            if name not in (BASE, FROZEN, "full")
        ]
        narrow = [
            t for t in types if jnp.issubdtype(t, jnp.floating) and t.itemsize < 4
        ]
        found += [(dotted(keys), t.name) for t in narrow[:1]]
    return found


def filter_value_and_grad(
    fun: Callable | None = None, *, has_aux: bool = False, **gradkwargs
) -> Callable:
    """`equinox.filter_value_and_grad`, with respect to what trains alone.

    The gradient of a frozen weight is never made. A training loop changes in two
    places, the gradient and what the optimiser is initialised with:

    ```python
    @lora_quax.filter_value_and_grad
    @quax.quaxify
    def loss(model, x, y):
        ...

    params, _ = lora_quax.partition(model)
    opt_state = optim.init(params)
    for x, y in data:
        value, grads = loss(model, x, y)
        params, _ = lora_quax.partition(model)
        updates, opt_state = optim.update(grads, opt_state, params)
        model = eqx.apply_updates(model, updates)
    ```

    **Arguments:**

    - `fun`: the function to differentiate, with the model as its first positional
        argument.
    - `has_aux`: whether `fun` returns a pair, of which only the first is
        differentiated.
    - the others: as for `jax.value_and_grad`.

    **Returns:** a function of the same arguments that returns `(value, gradient)`, or
    `((value, aux), gradient)`. The gradient has `None` at every leaf that is frozen. A
    function, if `fun` is left out, to be used as a decorator.

    **Raises:** `ValueError`, when called, if nothing in the first argument trains.
    """
    if fun is None:
        return ft.partial(filter_value_and_grad, has_aux=has_aux, **gradkwargs)
    return _differentiate(eqx.filter_value_and_grad, fun, has_aux, gradkwargs)


def filter_grad(
    fun: Callable | None = None, *, has_aux: bool = False, **gradkwargs
) -> Callable:
    """`equinox.filter_grad`, with respect to what trains alone.

    **Arguments:**

    - `fun`, `has_aux`, the others: as for `filter_value_and_grad`.

    **Returns:** a function of the same arguments that returns the gradient, or
    `(gradient, aux)`.

    **Raises:** `ValueError`, when called, if nothing in the first argument trains.
    """
    if fun is None:
        return ft.partial(filter_grad, has_aux=has_aux, **gradkwargs)
    return _differentiate(eqx.filter_grad, fun, has_aux, gradkwargs)


def _differentiate(transform, fun, has_aux: bool, gradkwargs) -> Callable:
    def of_params(params, frozen, *args, **kwargs):
        return fun(eqx.combine(params, frozen), *args, **kwargs)

    differentiated = transform(of_params, has_aux=has_aux, **gradkwargs)

    @ft.wraps(fun)
    def wrapper(*args, **kwargs):
        if not args:
            raise TypeError(
                "The first argument of the function, with respect to which it is "
                "differentiated, must be given by position."
            )
        model, *args = args
        return differentiated(*_partition(model), *args, **kwargs)

    return wrapper
