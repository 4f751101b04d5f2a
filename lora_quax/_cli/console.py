"""Where the commands print."""

from rich.console import Console


_WIDE = 10_000  # A path is never cut off for want of room.


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal or, in a pipe or a file, as the text."""
    out = Console(stderr=stderr, highlight=False)
    if out.is_terminal:
        return out
    return Console(stderr=stderr, highlight=False, width=_WIDE)


def show(table) -> None:
    """Prints a table with no blanks at the ends of its lines."""
    out = console()
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as capture:
        out.print(table)
    lines = (line.rstrip() for line in capture.get().splitlines())
    print(*filter(None, lines), sep="\n")
