"""Descriptions as version 1 of the format had them, brought up to date.

There each form had a layout of its own, which left out the shapes of the factors: they
follow from the shape of the weight, the rank, and how many axes are rows and columns.
"""

from typing import Any

from .description import form_of


def upgraded(about: Any, levels: int = 16) -> dict[str, Any]:
    """The description of an array, as `describe` writes it now.

    **Raises:** one of `NONSENSE` if it makes no sense.
    """
    if not levels:
        raise ValueError("it has too many adapters on one another")
    form = form_of(about)
    if form == "array":
        if not isinstance(about["shape"], list):
            raise ValueError(f"{about['shape']!r:.40} is no shape")
        return {key: about[key] for key in ("form", "shape", "dtype")}
    if form == "low_rank":
        return _low_rank(about, about["shape"])
    base = upgraded(about["base"], levels - 1)
    shape = _shape(base)
    if form == "full":
        value = {"form": "array", "shape": shape, "dtype": about["dtype"]}
        return {"form": form, "base": base, "value": value}
    if form != "lora":
        raise ValueError(f"its form {form!r} is not known")
    # The sum and its update each said whether they may be formed. The sum was asked.
    may = {"allow_materialise": about["allow_materialise"]}
    return {
        "form": form,
        "base": base,
        "delta": _low_rank({**about["delta"], **may}, shape),
        "stop_gradient": about["stop_gradient"],
        "stopped": False,
    }


def _shape(about: dict[str, Any]) -> list[int]:
    """That of the weight that was adapted, of which the description is upgraded."""
    while "base" in about:
        about = about["base"]
    if about["form"] != "array":
        raise ValueError("it adapts an update, which is around nothing")
    return about["shape"]


def _low_rank(about: dict[str, Any], shape: list[int]) -> dict[str, Any]:
    rank, rows, cols = (about[key] for key in ("rank", "rows", "cols"))
    n = len(shape) - rows - cols
    if min(n, rows, cols) < 0:
        raise ValueError(f"it has shape {shape}, too few axes for {rows} and {cols}")
    types = about["dtype"]
    a = [*shape[:n], rank, *shape[n + rows :]]
    b = [*shape[: n + rows], rank]
    return {
        "form": "low_rank",
        "a": {"form": "array", "shape": a, "dtype": types["a"]},
        "b": {"form": "array", "shape": b, "dtype": types["b"]},
        "rank": rank,
        "alpha": about["alpha"],
        "rows": rows,
        "cols": cols,
        "allow_materialise": about["allow_materialise"],
    }
