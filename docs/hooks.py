"""Pages of the site that lie elsewhere in the repository, each at its own path.

A link from one of them to another is then right here and in the repository alike.
"""

from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
PATTERNS = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "UPSTREAM.md",
    "benchmarks/README.md",
    "benchmarks/results/README.md",
    "benchmarks/results/*.svg",
    "notebooks/*.ipynb",
)


@event_priority(50)  # Before the plugin that renders notebooks.
def on_files(files, config):
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            goal = config.site_dir, config.use_directory_urls
            files.append(File(name, str(ROOT), *goal))
    return files


def on_page_markdown(markdown, page, config, files):
    """What is `docs/` in the repository is the root of the site."""
    return markdown.replace("](docs/", "](")
