"""What the documentation site needs beyond mkdocs: pages made of files outside ``docs/``, links to sources.

``README.md`` and the pages of ``docs/`` are read in the repository too, so their links go to files of the
repository. On the site a link to a source file becomes a link to a copy of it (``source/PATH.txt``, which a
browser shows), one to a root page or to ``configs/`` a link to the page made of it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: File or folder of the repository -> page of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "configs": "examples.md",
}
_LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?\)")
_COPIES: dict[str, str] = {}


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    made = {site: rooted((ROOT / name).read_text()) for name, site in PAGES.items() if name != "configs"}
    for name, text in (made | {"examples.md": examples()}).items():
        files.append(File.generated(config, name, content=text))
    _COPIES.clear()
    for page in [*files.documentation_pages()]:
        for target in outside(page.content_string, page.src_uri):
            _COPIES[target] = f"source/{target}.txt"
    for target, copy in _COPIES.items():
        files.append(File.generated(config, copy, content=(ROOT / target).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = posixpath.dirname(page.file.src_uri)

    def changed(match: re.Match[str]) -> str:
        target = in_repository(match[2], page.file.src_uri)
        site = PAGES.get(target) or _COPIES.get(target)
        return f"{match[1]}{posixpath.relpath(site, here or '.')}{match[3] or ''})" if site else match[0]

    return _LINK.sub(changed, markdown)


def rooted(text: str) -> str:
    """A page of the repository's root, as if it stood in ``docs/``."""
    return _LINK.sub(
        lambda m: (
            f"{m[1]}{m[2][5:] if m[2].startswith('docs/') else '../' + m[2]}{m[3] or ''})"
            if (ROOT / m[2]).exists()
            else m[0]
        ),
        text,
    )


def in_repository(link: str, page: str) -> str:
    """The path in the repository that a link on a page means, if it is outside ``docs/``; else ""."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return "" if target.startswith(("docs/", "../")) else target


def outside(text: str, page: str) -> set[str]:
    """The repository's files that a page links to."""
    found = {in_repository(match[2], page) for match in _LINK.finditer(text)}
    return {target for target in found if target and (ROOT / target).is_file() and target not in PAGES}


def examples() -> str:
    """``configs/``, each file as it is."""
    lines = [
        "# Examples of domain files",
        "",
        "The files of `configs/`. A test loads each; the demo and the tests on Xen boot them.",
    ]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        lines += ["", f"## {path.name}", "", "```yaml", path.read_text().rstrip(), "```"]
    return "\n".join(lines) + "\n"
