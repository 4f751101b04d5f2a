"""The plots that README shows, drawn from the files of results."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import _results


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
            results[name] = _results.read(path)
    if "transformer" in results:
        yield _bars(results["transformer"], folder / "transformer.svg")
    if all(f"{sweep}-sweep" in results for sweep in SWEEPS):
        yield _lines(results, folder / "sweeps.svg")


def _is_ours(name: str) -> bool:
    return name.startswith("ours")


def _bars(result: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    (point,) = result["runs"][0]["points"]
    ratios = _results.over(result, point)
    names = sorted(ratios, key=lambda name: ratios[name].middle)
    low, middle, high = zip(*(ratios[name] for name in names))
    errors = [
        [m - l for l, m in zip(low, middle)],
        [h - m for m, h in zip(middle, high)],
    ]
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    colours = ["C0" if _is_ours(name) else "0.7" for name in names]
    bars = axes.barh(names, middle, xerr=errors, color=colours)
    axes.bar_label(bars, [f" {x:.2f}" for x in middle], label_type="center")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(
        xlabel="time ÷ that of the frozen model: median and range of the runs",
        title=result["title"],
    )
    axes.title.set_fontsize("medium")
    return _save(figure, path)


def _lines(results: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(SWEEPS), figsize=(12, 3), sharey=True, layout="constrained"
    )
    for sweep, axes in zip(SWEEPS, panels):
        result = results[f"{sweep}-sweep"]
        points = result["runs"][0]["points"]
        at = [int(point) for point in points]
        ratios = [_results.over(result, point) for point in points]
        for name, colour in zip(ratios[0], ("black", "0.6", "C0")):
            low, middle, high = zip(*(point[name] for point in ratios))
            axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(at, middle, ".-", color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [str(x) for x in at], fontsize="x-small")
        axes.set(xlabel=sweep)
    # At 24 layers what is written by hand takes eight times as long.
    panels[0].set_yscale("log", base=2)
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].set(ylabel="time ÷ frozen model")
    panels[0].legend(fontsize="x-small")
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
