"""Descriptions as version 1 of the format had them, brought up to date.

There each form had a layout of its own, which left out the shapes of the factors.
"""

from typing import Any


def upgraded(about: dict[str, Any], levels: int = 16) -> dict[str, Any]:
    """The description of an array, as `describe` writes it now.

    **Raises:** `KeyError`, `TypeError` or `ValueError` if it makes no sense.
    """
    if not levels:
        raise ValueError("it has too many adapters on one another")
    form = about["form"]
    if form == "array":
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
    return {
        "form": form,
        "base": base,
        "delta": _low_rank(about["delta"], shape),
        "stop_gradient": about["stop_gradient"],
        "stopped": False,
    }


def _shape(about: dict[str, Any]) -> list[int]:
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
