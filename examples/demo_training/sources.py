"""Raw text of the demo corpus: Debian packages and Python's standard library.

Every kind of text is a list of :class:`Document`.  A document knows which
split it belongs to, because splits are made of whole books, chapters, modules
or runs of dictionary entries, never of single lines.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sysconfig
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = ("dict-gcide", "debian-handbook", "bible-kjv", "bible-kjv-text")
LANGUAGES = {"en": "en-US", "fr": "fr-FR", "de": "de-DE", "es": "es-ES"}
KINDS = ("dictionary", *(f"handbook-{code}" for code in LANGUAGES), "bible", "python")

# The same chapters are held out in all four languages: a translation of a
# held-out page would otherwise be training text.
HANDBOOK_SPLITS = {"heldout": {9, 10}, "valid": {14}}
BIBLE_SPLITS = {
    "heldout": {"Romans", "1 Corinthians", "2 Corinthians", "Galatians"},
    "valid": {"Ruth", "Esther"},
}
HELDOUT_MODULES = (
    "bisect cmd contextlib csv fnmatch getopt glob gzip heapq netrc queue sched string tempfile textwrap timeit"
)
PYTHON_SPLITS = {
    "heldout": {f"{name}.py" for name in HELDOUT_MODULES.split()},
    "valid": {"calendar.py", "shlex.py"},
}
# Positions in the alphabet of headwords, as a share of the dictionary's text.
DICTIONARY_SPLITS = {"heldout": (0.550, 0.556), "valid": (0.300, 0.3015)}
DOCUMENT_CHARACTERS = 6000


@dataclass(frozen=True)
class Document:
    """One piece of text and the split ("train", "valid" or "heldout") it belongs to."""

    text: str
    split: str


def fetch_packages(cache: Path) -> Path:
    """Download and unpack the Debian packages; returns the unpacked tree."""
    tree = cache / "unpacked"
    if tree.is_dir():
        return tree
    debs = cache / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=debs, check=True)
    partial = cache / "unpacked.partial"
    for deb in sorted(debs.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(deb), str(partial)], check=True)
    partial.rename(tree)
    return tree


def load_documents(tree: Path) -> dict[str, list[Document]]:
    """All documents by kind, in the order of :data:`KINDS`."""
    documents = {"dictionary": dictionary(tree), **handbooks(tree)}
    return documents | {"bible": bible(tree), "python": python_library()}


def split_of(key: object, splits: dict[str, set]) -> str:
    """The split whose set holds ``key``; everything else is training text."""
    return next((name for name, keys in splits.items() if key in keys), "train")


def dictionary(tree: Path) -> list[Document]:
    """The GNU Collaborative International Dictionary of English, in runs of entries."""
    with gzip.open(tree / "usr/share/dictd/gcide.dict.dz", "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    text = text[text.index("\nA \\A") :]
    # Nearly every paragraph ends in a line such as "[1913 Webster]": a source
    # mark that would take a tenth of the text and teach nothing.
    text = re.sub(r"\n +\[(?:1913 Webster|PJC|WordNet|Webster|Century Dict)[^\]\n]*\][^\n]*", "", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    documents: list[Document] = []
    entries: list[str] = []
    size = done = 0
    for entry in re.split(r"\n\n(?=\S)", text.strip()):
        entries.append(entry)
        size += len(entry) + 2
        if size >= DOCUMENT_CHARACTERS:
            documents.append(Document("\n\n".join(entries), dictionary_split(done / len(text))))
            done += size
            entries, size = [], 0
    return documents


def dictionary_split(position: float) -> str:
    """The split of the entries at ``position`` (0 to 1) of the dictionary."""
    inside = (name for name, (low, high) in DICTIONARY_SPLITS.items() if low <= position < high)
    return next(inside, "train")


class HandbookParser(HTMLParser):
    """Paragraphs, headings and listings of one page of the handbook."""

    BLOCKS = frozenset(
        {"p", "div", "h1", "h2", "h3", "h4", "h5", "li", "dt", "dd", "pre", "tr", "table", "ul", "ol", "dl"}
    )
    VOID = frozenset({"br", "hr", "img", "meta", "link", "input", "col"})
    SKIPPED = frozenset({"docnav", "toc", "banner"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title = ""
        self.blocks: list[str] = []
        self._parts: list[str] = []
        self._stack: list[tuple[str, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.VOID:
            return
        if tag in self.BLOCKS:
            self._flush()
        names = {name for key, value in attrs if key in ("class", "id") for name in (value or "").split()}
        # Navigation, tables of contents and the page banner repeat on every page.
        self._stack.append((tag, tag == "head" or bool(names & self.SKIPPED)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID or not any(name == tag for name, _ in self._stack):
            return
        if tag in self.BLOCKS:
            self._flush()
        while self._stack.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._stack and self._stack[-1][0] == "title":
            self.title += data
        elif not any(skipped for _, skipped in self._stack):
            self._parts.append(data)

    def _flush(self) -> None:
        text = "".join(self._parts).replace("\xa0", " ")
        self._parts = []
        if not any(tag == "pre" for tag, _ in self._stack):
            text = " ".join(text.split())
        if text.strip():
            self.blocks.append(text.strip("\n").rstrip())


def parse_page(path: Path) -> HandbookParser:
    """Parse one HTML page."""
    parser = HandbookParser()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


def handbooks(tree: Path) -> dict[str, list[Document]]:
    """The Debian Administrator's Handbook in each language, one document per page."""
    root = tree / "usr/share/doc/debian-handbook/html"
    pages = {path.name: parse_page(path) for path in sorted((root / "en-US").glob("*.html"))}
    chapters = {name: chapter_number(page.title) for name, page in pages.items()}
    order = sorted((name for name in pages if name != "index.html"), key=lambda name: (chapters[name], name))
    english = {block for page in pages.values() for block in page.blocks if len(block) > 60}
    documents = {}
    for code, folder in LANGUAGES.items():
        documents[f"handbook-{code}"] = [
            Document("\n\n".join(blocks), split_of(chapters[name][0], HANDBOOK_SPLITS))
            for name in order
            if (root / folder / name).is_file()
            # Paragraphs nobody has translated yet stand in English in every language.
            and (blocks := [b for b in parse_page(root / folder / name).blocks if code == "en" or b not in english])
        ]
    return documents


def chapter_number(title: str) -> tuple[int, int]:
    """Chapter and section of a title such as "9.10. Backup" or "Chapter 9. Unix Services", not of "A.9. Devuan"."""
    match = re.search(r"(?<![A-Z]\.)\b(\d+)\.(?:(\d+)\.)?", title)
    return (int(match[1]), int(match[2] or 0)) if match else (0, 0)


def bible(tree: Path) -> list[Document]:
    """The King James Bible by books, as the package's own reader prints it."""
    command = [str(tree / "usr/bin/bible"), "-p", str(tree / "usr/lib"), "-l", "79"]
    printed = subprocess.run([*command, "Gen1:1-Rev22:21"], capture_output=True, check=True).stdout
    books: dict[str, list[str]] = {}
    # A chapter starts with its book's name and number alone on a line.
    pieces = re.split(r"^(\S.*?) (\d+)\s*$", printed.decode("latin-1"), flags=re.MULTILINE)
    for name, number, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        books.setdefault(name.strip(), []).append(f"{name.strip()} {number}\n\n{text.strip(chr(10))}")
    return [Document("\n\n".join(text), split_of(name, BIBLE_SPLITS)) for name, text in books.items()]


def python_library() -> list[Document]:
    """The running interpreter's standard library, one document per module, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "__pycache__"}
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        # Names that start with _sysconfigdata describe the machine that built Python.
        if left_out.intersection(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            documents.append(Document(text, split_of(str(name), PYTHON_SPLITS)))
    return documents
