"""What an HTML page holds, read by the standard library's parser."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "base", "embed", "source"}
SHAPES = {"line", "rect", "circle"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    """Of it and all that it holds."""


@dataclass
class Page:
    elements: list[Element] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]

    def by_id(self, name: str) -> Element:
        (found,) = [each for each in self.elements if each.attributes.get("id") == name]
        return found

    @property
    def text(self) -> str:
        (body,) = self.all("body")
        return re.sub(r"[ \n]+", " ", body.text)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page()
        self.open: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        if len(element.attributes) < len(attrs):
            self.page.errors.append(f"<{tag}> repeats an attribute")
        self.page.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in SHAPES:
            self.page.errors.append(f"<{tag}/> is no shape of SVG")
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1].tag != tag:
            self.page.errors.append(f"</{tag}> in {[each.tag for each in self.open]}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def read(html: str) -> Page:
    """Its elements, in order, and what is wrong with how they are nested."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    reader.page.errors += [f"<{element.tag}> is not closed" for element in reader.open]
    return reader.page
