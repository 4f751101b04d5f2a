"""Pages of the site that lie elsewhere in the repository, and links between them all.

In the repository the pages lie in `docs/`, beside the files that are pages too; on the
site `docs/` is the root. Links are written as they are right in the repository.
"""

# It may not be installed where types are checked.
# pyright: reportMissingImports=false

import posixpath
import re
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
    "benchmarks/results/jax-0.10/*.md",
    "benchmarks/results/jax-0.10/*.svg",
    "notebooks/*.ipynb",
)
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")


@event_priority(50)  # Before the plugin that renders notebooks.
def on_files(files, config):
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            goal = config.site_dir, config.use_directory_urls
            files.append(File(name, str(ROOT), *goal))
    return files


def on_page_markdown(markdown, page, config, files):
    name = page.file.src_uri
    is_outside = page.file.src_dir == str(ROOT)
    folder = posixpath.dirname(name if is_outside else f"docs/{name}")

    def on_site(link):
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        return posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(name))

    return LINK.sub(on_site, markdown)
