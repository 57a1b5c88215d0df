"""What each file of the engine is, in its own words: the last table of solutions/README.md.

``python -m tests.file_list`` prints the list as it should be now; ``--write`` puts it there. A file's row is the first sentence
of its docstring, or of the comment at its top. Folders stand in the order of their floors, the highest first.
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

from .test_floors import ROOT, Graph, files, folders, name

DOCUMENT = ROOT / "README.md"
SOURCES = {".py", ".cpp", ".h", ".cu"}
LIST = re.compile(r"(?<=<!-- files -->\n\n).*?(?=\n\n## )", re.DOTALL)


def first_sentence(path: Path) -> str:
    """What a file says of itself, in Markdown.

    Raises:
        ValueError: it says nothing.
    """
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(source)) or ""
    else:
        comment = re.match(r"(?://.*\n)*", source)
        text = "" if comment is None else re.sub(r"^// ?", "", comment[0], flags=re.MULTILINE)
    paragraph = " ".join(text.split("\n\n")[0].split())
    if not paragraph:
        raise ValueError(f"{name(path)} does not say what it is")
    sentence = re.split(r"(?<=\.)\s", paragraph)[0]
    return sentence.replace("``", "`").replace("|", "\\|")


def floors(graph: Graph) -> list[str]:
    """The folders of the engine; one that imports from another stands before it. Where both may come first, by name."""
    left, order = dict(graph), list[str]()
    while left:
        free = min(folder for folder in left if all(folder not in others for others in left.values()))
        order.append(free)
        del left[free]
    return order


def file_list() -> str:
    """The list as Markdown: a folder a heading, a file a row."""
    parts = []
    for folder in floors(folders(files())):
        paths = sorted(path for path in (ROOT / folder).iterdir() if path.suffix in SOURCES)
        rows = [f"| [{path.name}]({name(path)}) | {first_sentence(path)} |" for path in paths]
        if folder != ".":
            parts += ["\n".join([f"### {folder}/", "", "| file | what it is |", "|---|---|", *rows])]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.file_list", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the list into solutions/README.md")
    if parser.parse_args().write:
        DOCUMENT.write_text(LIST.sub(lambda _: file_list(), DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(file_list())


if __name__ == "__main__":
    main()
