"""A page as a document, by a parser that shares no code with the template."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "input", "wbr", "img"}
FETCHES = {"src", "href", "srcset", "action", "poster", "data", "formaction", "background"}


class Document(HTMLParser):
    """Tags, attributes and the text of scripts and styles, by a parser that shares no code with the template."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.raw:
            self.raw[tag].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]][-1] += data
        else:
            self.words.append(data)


def policy_of(document: Document) -> dict[str, list[str]]:
    content = next(a["content"] for t, a in document.tags if a.get("http-equiv") == "Content-Security-Policy")
    parts = [part.split() for part in (content or "").split(";")]
    return {part[0]: part[1:] for part in parts}
