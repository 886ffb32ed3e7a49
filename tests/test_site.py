"""The built site is whole: every public name, every link, no other host. Needs no torch.

`mkdocs build --strict` comes first, as in `python -m nox -s docs`.
"""

import ast
import os
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"
TOP = urlsplit(os.environ.get("SITE_URL", "")).path  # of where it is published
PACKAGES = ("revcore", "revmodels", "revdata", "revtrain")
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))


class Page(HTMLParser):
    """What of a page is asked about.

    Attributes:
        ids: Where links may lead to.
        links: Where its links lead to.
        loads: What the browser loads by itself.
        blocks: The languages of its code blocks.
    """

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.blocks = set(), [], [], []
        self.feed((SITE / path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in {"canonical", "prev", "next"}:
            self.loads.append(found["href"])
        if tag not in {"a", "link"}:
            self.loads += [found[key] for key in ("src", "data", "poster") if found.get(key)]
            self.loads += [part.split()[0] for part in found.get("srcset", "").split(",") if part]
        self.blocks += re.findall(r"language-(\w+) highlight", found.get("class") or "")


read = cache(Page)


def public_names(package):
    source = ROOT / "packages" / package / "src" / package / "__init__.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{source} has no __all__")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package):
    path = f"api/{package}/index.html"
    html = (SITE / path).read_text(encoding="utf-8")
    names = public_names(package)
    assert names
    missing = [name for name in names if f"{package}.{name}" not in read(path).ids]
    assert not missing
    for name in names:  # with what its docstring says
        entry = html.partition(f'id="{package}.{name}"')[2]
        assert re.match(r'[^$]*?<div class="doc doc-contents ?">\s*<p>\w', entry), name


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_somewhere(path):
    base = (SITE / path).parent
    broken = []
    for link in read(path).links + read(path).loads:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        if path == "404.html":  # is shown under any address, so its links begin at the root
            target = SITE / unquote(parts.path).removeprefix(TOP).lstrip("/")
        else:
            target = (base / unquote(parts.path)).resolve() if parts.path else SITE / path
        if target.is_dir():
            target /= "index.html"
        if not target.is_file():
            broken.append(link)
        elif parts.fragment and target.suffix == ".html":
            ids = read(target.relative_to(SITE).as_posix()).ids
            # The theme makes these of the page's address in the browser.
            if unquote(parts.fragment) not in ids and not parts.fragment.startswith("__"):
                broken.append(link)
    assert not broken


@pytest.mark.parametrize("path", PAGES)
def test_nothing_is_loaded_from_another_host(path):
    elsewhere = [url for url in read(path).loads if urlsplit(url).netloc]
    assert not elsewhere


READMES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "packages/*/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("path", READMES)
def test_files_that_a_readme_names_are_there(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)|(?:src|srcset)=\"([^\"]+)", text)
    names = [name for link in links for name in link if name and not urlsplit(name).scheme]
    assert [name for name in names if not ((ROOT / path).parent / name).exists()] == []


def test_styles_load_nothing_from_another_host():
    for path in SITE.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", path.read_text(encoding="utf-8"))
        elsewhere = [url for url in urls if urlsplit(url).netloc]
        assert not elsewhere, path


def sources():
    """Pages of prose, whose Python blocks test_documents.py runs."""
    docs = ROOT / "docs"
    return sorted(
        p.relative_to(docs).as_posix() for p in docs.rglob("*.md") if p.parent.name != "api"
    )


@pytest.mark.parametrize("path", sources())
def test_what_is_shown_as_python_is_what_is_run(path):
    text = (ROOT / "docs" / path).read_text(encoding="utf-8")
    run = len(re.findall(r"(?m)^```python$", text))
    run += len(re.findall(r'(?m)^``` \{ \.python title="examples/', text))  # test_examples.py
    page = path.removesuffix("index.md") if path.endswith("index.md") else path[:-3] + "/"
    shown = read(f"{page}index.html").blocks
    assert sum(language in {"python", "py", "python3"} for language in shown) == run
    # The doctests of an API reference, which run with the package's tests.
    assert path == "migration.md" or "pycon" not in shown


def test_error_messages_are_those_of_the_code():
    page = (ROOT / "docs" / "own-model.md").read_text(encoding="utf-8")
    rows = page.partition("| message |")[2].partition("\n\n")[0].splitlines()[2:]
    messages = [re.match(r"\| `([^`]+)` \|", row)[1] for row in rows]
    assert messages
    texts = [
        ast.unparse(node)  # with what literals beside each other add up to
        for file in (ROOT / "packages" / "revcore" / "src").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Constant, ast.JoinedStr))
    ]
    for message in messages:
        for part in message.split("..."):
            assert any(part.strip() in text for text in texts), message


def test_citation_is_that_of_the_file():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    entry = (ROOT / "docs" / "cite.md").read_text(encoding="utf-8").partition("@software")[2]
    for ours, theirs in (("title", "title"), ("version", "version"), ("date", "date-released")):
        value = re.search(rf"(?m)^{theirs}: \"?([^\"\n]+)", citation)[1]
        assert re.search(rf"{ours} += {{([^}}]+)}}", entry)[1] == value
