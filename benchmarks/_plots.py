"""The plots that README shows, drawn from the files of results."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any


SWEEPS = ("width", "tokens", "rank", "depth")


def draw(folder: Path) -> Iterator[Path]:
    """Draws what there are results for, and yields the files. Needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    # The same results give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "lora_quax"
    results = {}
    for name in ("transformer", *(f"{sweep}-sweep" for sweep in SWEEPS)):
        path = folder / f"{name}.json"
        if path.exists():
            results[name] = json.loads(path.read_text())
    if "transformer" in results:
        yield _bars(results["transformer"], folder / "transformer.svg")
    if all(f"{sweep}-sweep" in results for sweep in SWEEPS):
        yield _lines(results, folder / "sweeps.svg")


def _ratios(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Quartiles of each row's time over the first one's."""
    out = {}
    for row in rows:
        ratios = [x / y for x, y in zip(row["times"], rows[0]["times"])]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        out[row["name"]] = low, middle, high
    return out


def _is_ours(name: str) -> bool:
    return name.startswith("ours")


def _bars(result: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    (rows,) = result["points"].values()
    ratios = _ratios(rows)
    names = sorted(ratios, key=lambda name: ratios[name][1])
    middle = [ratios[name][1] for name in names]
    errors = [
        [ratios[name][1] - ratios[name][0] for name in names],
        [ratios[name][2] - ratios[name][1] for name in names],
    ]
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    colours = ["C0" if _is_ours(name) else "0.7" for name in names]
    bars = axes.barh(names, middle, xerr=errors, color=colours)
    axes.bar_label(bars, [f" {x:.2f}" for x in middle], label_type="center")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="time ÷ floor, quartiles", title=result["title"])
    axes.title.set_fontsize("medium")
    return _save(figure, path)


def _lines(results: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(SWEEPS), figsize=(12, 3), sharey=True, layout="constrained"
    )
    for sweep, axes in zip(SWEEPS, panels):
        points = results[f"{sweep}-sweep"]["points"]
        at = [int(point) for point in points]
        ratios = [_ratios(rows) for rows in points.values()]
        for name, colour in zip(ratios[0], ("black", "0.6", "C0")):
            low, middle, high = zip(*(point[name] for point in ratios))
            axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(at, middle, ".-", color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [str(x) for x in at], fontsize="x-small")
        axes.set(xlabel=sweep)
    panels[0].set(ylabel="time ÷ floor")
    panels[0].legend(fontsize="x-small")
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
