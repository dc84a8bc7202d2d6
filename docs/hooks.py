"""What the site is made of besides the pages in this folder.

Notebooks become pages with their outputs, CONTRIBUTING.md and CHANGELOG.md get a page each, ``FOLDER/*.md`` in the
navigation is every page of the folder, and docstrings become Markdown.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
SHELL = "%%bash\n"
"""What the cells of a notebook begin with that are for the shell."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = _expanded(config.nav, Path(config.docs_dir))
    return config


def _expanded(nav: Any, folder: Path) -> Any:
    if isinstance(nav, list):
        return [_expanded(item, folder) for item in nav]
    if isinstance(nav, dict):
        return {title: _expanded(item, folder) for title, item in nav.items()}
    return [page.relative_to(folder).as_posix() for page in sorted(folder.glob(nav))] if "*" in nav else nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        stem = notebook.src_uri.removesuffix(".ipynb")
        text, pictures = _page(json.loads(notebook.content_string), Path(stem).name)
        files.append(File.generated(config, f"{stem}.md", content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"{Path(stem).parent.as_posix()}/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    return re.sub(r"\]\(([^):]+)\.ipynb\)", r"](\1.md)", markdown)


def _page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        language, code = ("bash", source[len(SHELL) :]) if source.startswith(SHELL) else ("python", source)
        parts.append(f"```{language}\n{code}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}-{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode(data["image/png"])
                parts.append(f"![what the lines above draw]({picture})")
            else:
                text = "".join(output.get("text") or data["text/plain"])
                parts.append(f"``` {{ .text .output }}\n{text.rstrip()}\n```")
    parts.append(f'<small>This page is a notebook: <a href="../{name}.ipynb" download>{name}.ipynb</a>.</small>')
    return "\n\n".join(parts), pictures


class AsMarkdown(griffe.Extension):
    """Docstrings as Markdown: the name in ``:func:`~package.name``` in code type, examples (>>>) as blocks."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            value = re.sub(r":\w+:`~[\w.]*?(\w+)`", r"`\1`", obj.docstring.value)
            value = re.sub(r":(?:func|class|meth|attr|data|mod):`([^`]+)`", r"`\1`", value)
            obj.docstring.value = re.sub(r"^((?:>>> .*)(?:\n.+)*)", r"```pycon\n\1\n```", value, flags=re.MULTILINE)
