"""What a page of the documentation holds: its blocks, links, headings and code spans.

A block opts out of being run with a comment before it that gives the reason:

    <!-- not run: needs vLLM -->
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "training/*.md", "packages/*/*.md")
    for path in ROOT.glob(pattern)
)
_OPT_OUT = re.compile(r"<!-- not run: (\S.*\S) -->")


@dataclass
class Block:
    """One fenced block."""

    language: str
    text: str
    line: int
    reason: str | None  # why it is not run


@dataclass
class Page:
    """One parsed page."""

    name: str
    text: str
    blocks: list[Block] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    spans: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)  # cells of every table row, as text
    row_links: list[list[str]] = field(default_factory=list)  # links of the same rows


def flowing(name):
    """A page's text with single spaces for its line breaks."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def read(name):
    """Parse a page of the repository."""
    text = (ROOT / name).read_text(encoding="utf-8")
    page, before = Page(name, text), None
    in_heading = False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "fence":
            comment = before.content.strip() if before and before.type == "html_block" else ""
            opted = _OPT_OUT.fullmatch(comment)
            page.blocks.append(
                Block(token.info, token.content, token.map[0] + 1, opted and opted.group(1))
            )
        elif token.type == "heading_open":
            in_heading = True
        elif token.type == "tr_open":
            page.rows.append([])
            page.row_links.append([])
        elif token.type == "inline":
            plain = "".join(
                child.content for child in token.children if child.type in ("text", "code_inline")
            )
            links = [
                child.attrGet("href") or child.attrGet("src")
                for child in token.children
                if child.type in ("link_open", "image")
            ]
            page.links += links
            page.spans += [child.content for child in token.children if child.type == "code_inline"]
            if in_heading:
                page.anchors.add(_slug(plain, page.anchors))
                in_heading = False
            if before.type in ("td_open", "th_open"):
                page.rows[-1].append(plain)
                page.row_links[-1] += links
        before = token
    return page


def _slug(heading, taken):
    """The anchor that GitHub gives a heading."""
    slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    number, name = 0, slug
    while name in taken:
        number += 1
        name = f"{slug}-{number}"
    return name
