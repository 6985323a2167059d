"""The book's own Sphinx extension: what Jupyter Book does not do.

``{seconds}`02-anp` `` in a page becomes the seconds that the chapter took in the last `make execute`, from
book/results/notebook_seconds.json, and ``{reading}`02-anp` `` the minutes that its words and code take to read: the
heads of the chapters never type them. ``{full-scale}`` and ``{record-files}`` stand for tables, see `recordext`.

Code in a docstring needs no double colon of reStructuredText, so docstrings stay readable in a terminal.

The text under "Returns:" may hold a colon, factory defaults are an ellipsis, fields of named tuples are left out.
"""

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from recordext import FullScale, RecordFiles
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring

SECONDS = Path("book/results/notebook_seconds.json")
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Examples?|Notes?|References):\s*$")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_role("seconds", seconds)
    app.add_role("reading", reading)
    app.add_directive("full-scale", FullScale)
    app.add_directive("record-files", RecordFiles)
    app.connect("autodoc-process-docstring", mark_code, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("autodoc-skip-member", skip_fields)
    # signatures are typed, so what stands before a colon under "Returns:" is prose, not a type
    GoogleDocstring._consume_returns_section = returns_prose  # type: ignore[method-assign]
    return {"version": "1", "parallel_read_safe": True}


def seconds(name, rawtext, text, lineno, inliner, options=None, content=None):
    """The role: a chapter's file name without its ending -> its seconds, as text."""
    environment = inliner.document.settings.env
    path = Path(environment.srcdir) / SECONDS
    environment.note_dependency(str(path))
    chapters = json.loads(path.read_text()).get("notebooks", {}) if path.is_file() else {}
    if text not in chapters:
        known = ", ".join(chapters) or "no chapter"
        message = inliner.reporter.warning(f"{SECONDS} knows {known}, not {text}: run make execute", line=lineno)
        return [nodes.Text("(not yet run)")], [message]
    return [nodes.Text(f"{chapters[text]['seconds']:.0f} s")], []


def reading(name, rawtext, text, lineno, inliner, options=None, content=None):
    """The role: a chapter's file name without its ending -> the minutes that reading it takes, to the next five."""
    environment = inliner.document.settings.env
    path = Path(environment.srcdir) / "notebooks" / f"{text}.ipynb"
    if not path.is_file():
        message = inliner.reporter.warning(f"no chapter {text}.ipynb in notebooks", line=lineno)
        return [nodes.Text("?")], [message]
    environment.note_dependency(str(path))
    return [nodes.Text(str(reading_minutes(json.loads(path.read_text(encoding="utf-8")))))], []


def reading_minutes(notebook: dict[str, Any]) -> int:
    """200 words of prose a minute and 6 seconds for a line of code that the page shows, to the next five minutes."""
    words = lines = 0
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += len(source.split())
        elif not {"remove-cell", "hide-cell", "hide-input"} & set(cell["metadata"].get("tags", [])):
            lines += sum(bool(line.strip()) for line in source.splitlines())
    return 5 * math.ceil((words / 200 + lines / 10) / 5)


def returns_prose(docstring: GoogleDocstring, preprocess_types: bool = False) -> list[tuple[str, str, list[str]]]:
    """A "Returns:" section as one description without a type."""
    return [("", "", docstring._dedent(docstring._consume_to_next_section()))]


def tidy_signature(
    app: Sphinx, what: str, name: str, obj: object, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """A default made by a factory is an ellipsis: Sphinx cannot parse `<factory>` and would show module paths."""
    return (re.sub(r"<factory>|<object object at \w+>", "...", signature) if signature else signature), returned


def skip_fields(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples: "Alias for field number 0" tells nobody anything."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def mark_code(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Make literal blocks of the code in a docstring, as far as its first section ("Args:" ...)."""
    end = next((i for i, line in enumerate(lines) if SECTION.match(line) or line.startswith(".. ")), len(lines))
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines[:end]).strip("\n"))
    out: list[str] = []
    for paragraph in paragraphs:
        previous = out[-1] if out else ""
        indented = paragraph.startswith("    ")
        if indented and not previous.startswith("    "):
            if not previous.rstrip().endswith("::") and not re.match(r"\s*([-*+]|\d+[.)])\s", previous):
                out.append("::")
        elif what == "module" and is_code(paragraph):
            # the formatter takes away the indentation of a block that ends a module's docstring
            out.append("::")
            paragraph = "\n".join(f"    {line}" for line in paragraph.splitlines())
        out.append(paragraph)
    lines[:] = [*"\n\n".join(out).splitlines(), "", *lines[end:]]


def is_code(paragraph: str) -> bool:
    """Whether a paragraph is Python, or command lines that start it."""
    if all(line.startswith("python ") for line in paragraph.splitlines()):
        return True
    try:
        ast.parse(paragraph)
    except SyntaxError:
        return False
    return any(sign in paragraph for sign in "(=.#")
