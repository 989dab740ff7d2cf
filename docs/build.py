"""Check the documentation and render it as HTML: `python docs/build.py [--check | --fix] [--out build/docs]`.

Checked are the relative links of README.md and docs/*.md, that the pages made from code (`generate.py`) are what it says,
and that code shown from a file is what the file holds:

    <!-- include: plugins-example/intensity/src/kernelforge_example_intensity/verb.py -->
    ```python
    ```

`--fix` makes those pages, and copies the files into the blocks below such comments; `--check` renders nothing.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from generate import stale_pages
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
INCLUDE = re.compile(
    r"(<!-- include: (?P<path>\S+) -->\n(?P<fence>`{3,})(?P<language>\w*)\n)(?P<code>.*?)(?P=fence)\n", re.DOTALL
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ background: #f4f4f4; padding: .8rem; overflow-x: auto; }}
table {{ border-collapse: collapse; }} td, th {{ border: 1px solid #ccc; padding: .2rem .6rem; text-align: left; }}
</style></head><body><nav>{nav}</nav>
{body}
</body></html>
"""


def pages() -> list[Path]:
    return [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]


def stale_includes(page: Path, *, fix: bool) -> Iterator[str]:
    """Say which code blocks are not what their files hold, or with `fix` make them so."""
    text = page.read_text(encoding="utf-8")
    fresh = text
    for match in INCLUDE.finditer(text):
        source = ROOT / match["path"]
        if not source.is_file():
            yield f"{page.relative_to(ROOT)}: includes {match['path']}, which is not there"
        elif match["code"] != (code := source.read_text(encoding="utf-8")):
            fresh = fresh.replace(match[0], f"{match[1]}{code}{match['fence']}\n")
            if not fix:
                yield f"{page.relative_to(ROOT)}: the code of {match['path']} has changed; python docs/build.py --fix"
    if fix and fresh != text:
        page.write_text(fresh, encoding="utf-8")


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    tokens = MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8"))
    return {slug(tokens[i + 1].content) for i, token in enumerate(tokens) if token.type == "heading_open"}


def broken_links(page: Path) -> Iterator[str]:
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            target = str(child.attrs.get("href") or child.attrs.get("src") or "")
            if not target or re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            if not linked.exists():
                yield f"{page.relative_to(ROOT)}: links to {target}, which is not there"
            elif anchor and linked.suffix == ".md" and anchor not in anchors(linked):
                yield f"{page.relative_to(ROOT)}: links to {target}, which has no such heading"


def _with_anchor(heading: re.Match[str]) -> str:
    tag, inner = heading.groups()
    return f'<{tag} id="{slug(html.unescape(re.sub("<.*?>", "", inner)))}">{inner}</{tag}>'


def render(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {page: "index" if page.name == "README.md" else page.stem for page in pages()}
    nav = " | ".join(f'<a href="{name}.html">{html.escape(name)}</a>' for name in names.values())
    markdown = MarkdownIt("commonmark").enable("table")
    for page, name in names.items():
        body = str(markdown.render(page.read_text(encoding="utf-8")))
        body = re.sub(r"<(h\d)>(.*?)</h\d>", _with_anchor, body)
        body = re.sub(r'href="(?:docs/)?([\w-]+)\.md(#[\w-]*)?"', r'href="\1.html\2"', body)
        (folder / f"{name}.html").write_text(PAGE.format(title=name, nav=nav, body=body), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="render nothing")
    parser.add_argument("--fix", action="store_true", help="write what is made from code and files")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", help="folder for the HTML")
    options = parser.parse_args()
    faults = list(stale_pages(ROOT / "docs", fix=options.fix))
    for page in pages():
        faults += [*stale_includes(page, fix=options.fix), *broken_links(page)]
    sys.stderr.writelines(f"{fault}\n" for fault in faults)
    if not options.check and not faults:
        render(options.out)
        sys.stderr.write(f"rendered {len(pages())} pages into {options.out}\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
