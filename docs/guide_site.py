"""A hook for MkDocs: the guide's pages are taken from where they lie in the repository, and keep their paths.

So a link between two of them is the same on GitHub, in an editor and on the site. A link to a file that is no page becomes the
file's path in the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

FENCED = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
TIGHT_LIST = re.compile(r"^((?![-\d|#>]|\s).*\n)(?=(?:-|1\.) )", re.MULTILINE)
"""The last line of a paragraph that a list follows without an empty line between, which MkDocs' Markdown takes for one text."""


def pages(nav: Any) -> list[str]:
    """All files that a `nav` of mkdocs.yml names, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [file for entry in (nav.values() if isinstance(nav, dict) else nav) for file in pages(entry)]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Put the pages, and what they are styled by, in the place of what lies in `docs`; the first is the site's front page.

    MkDocs cannot take them itself: its folder of pages may not be the one that mkdocs.yml lies in.
    """
    root = Path(config.config_file_path).parent
    added = [
        File.generated(config, file, abs_src_path=str(root / file), inclusion=InclusionLevel.INCLUDED)
        for file in (*pages(config.nav), *config.extra_css)
    ]
    added[0].dest_uri = "index.html"
    return Files([*added, *(file for file in files if file.src_dir != config.docs_dir)])


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write a page's text for the site."""
    root, source = Path(config.config_file_path).parent, page.file.src_uri
    known = {file.src_uri for file in files}
    pieces = FENCED.split(markdown)  # every second one is code
    pieces[::2] = [TIGHT_LIST.sub(r"\1\n", without_file_links(text, source, root, known)) for text in pieces[::2]]
    return "".join(pieces)


def without_file_links(text: str, source: str, root: Path, known: set[str]) -> str:
    """Put paths in the place of links to files that are no pages. Links that lead nowhere stay, for MkDocs to complain of.

    Args:
        source: the file that the text is from. known: the pages; both from the repository's root.
    """

    def replace(link: re.Match[str]) -> str:
        label, address = link[1], link[2].split("#")[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), address))
        if not address or "://" in address or path in known or not (root / path).exists():
            return link[0]
        return f"`{path}`" if path.endswith(label.strip("`/")) else f"{label} (`{path}`)"

    return LINK.sub(replace, text)
