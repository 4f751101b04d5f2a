"""Draws the picture of README and of the first page: `python docs/draw.py`."""

from pathlib import Path
from typing import Any


PICTURE = Path(__file__).parent / "picture.svg"

FROZEN, TRAINS, TEXT = "#d9dde3", "#4c8dd6", "#333333"
PROGRAM = ["x @ w.T", "conv(x, w)", "w.T, w[rows]", "scan, vmap, grad"]


def draw(path: Path = PICTURE) -> None:
    """Draws it. Needs matplotlib; the same text gives the same picture."""
    import matplotlib

    matplotlib.use("svg")
    # Letters as letters, so that the file is small and can be searched.
    matplotlib.rcParams |= {"svg.hashsalt": "lora_quax", "svg.fonttype": "none"}
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    figure, axes = plt.subplots(figsize=(8.4, 2.7))
    axes.set(xlim=(0, 84), ylim=(0, 27), aspect="equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)

    def box(x, y, width, height, colour):
        axes.add_patch(
            Rectangle((x, y), width, height, facecolor=colour, edgecolor="white")
        )

    def say(x, y, text, size=10, **options: Any):
        usual: dict[str, Any] = dict(ha="center", va="center", color=TEXT)
        options = usual | dict(family="sans-serif", fontsize=size) | options
        axes.text(x, y, text, **options)

    # The sum, with the parts as large as they are.
    box(2, 5, 16, 16, FROZEN)
    say(10, 13, "base")
    say(10, 23.5, "frozen", 8)
    say(20.5, 13, "+", 13)
    say(27.2, 13, "alpha / rank  ·", 9)
    box(34, 5, 3, 16, TRAINS)
    say(35.5, 13, "b", color="white")
    box(38.5, 18, 16, 3, TRAINS)
    say(46.5, 19.5, "a", color="white")
    say(44, 23.5, "train", 8)
    say(46.8, 11.5, "never summed", 9, style="italic")

    # What a program does to it, through Quax.
    arrow = dict(arrowstyle="->", color=TEXT, linewidth=1.2)
    axes.annotate("", xy=(65, 13), xytext=(56.5, 13), arrowprops=arrow)
    say(60.7, 15, "quaxify", 9)
    box(66, 4.2, 17, 17.6, "#f3f4f6")
    say(74.5, 23.5, "model code, unchanged", 8)
    for i, line in enumerate(PROGRAM):
        say(74.5, 19 - 4 * i, line, 9, family="monospace")
    say(28, 2, "one array, of the shape and type of its base", 8)

    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw()
