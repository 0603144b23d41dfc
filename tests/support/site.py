"""Builds the site of the docs, or builds and serves it: `scripts/docs`.

The pages are those of the repository, at the same places, so that their links lead where they lead on GitHub. What is
added: the navigation, from `docs/README.md`; a page for each file that a page links to, such as an example; the pages
of the reference, from the docstrings; and `llms.txt`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import griffe

ROOT = Path(__file__).resolve().parents[2]

_LINK = re.compile(r"(?<=\]\()([^)\s#]+)")
_FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
_ROW = re.compile(r"^\| \[([^\]]+)\]\((\S+\.md)\) \| (.+?) \|", re.MULTILINE)
_PICTURES = {".png", ".svg"}
_LANGUAGES = {".html": "html", ".js": "js", ".py": "python", ".sh": "sh", ".toml": "toml", ".yaml": "yaml"}
_COLOUR = re.compile(r"\x1b\[[\d;]*m")

# The pages of the reference: file, title, what is on it, and the modules whose public names are there. The longest
# module that fits has a name.
_REFERENCE = [
    ("manager", "ConnectionManager", "Keeps the connections of an app and broadcasts to them.", ["manager"]),
    ("connection", "Connection", "One accepted WebSocket, stream of events or long poll.", ["connection"]),
    ("publisher", "Publisher", "Broadcasts from a program that holds no connections.", ["publishing"]),
    (
        "web",
        "Routers and dependencies",
        "Endpoints that are written already, and what your own can depend on.",
        ["methods", "transports", "web"],
    ),
    ("hooks", "Hooks", "Your code around what happens.", ["hooks"]),
    (
        "messages",
        "Messages and audiences",
        "What travels, and whom it is for.",
        ["audience", "documents", "handlers", "message", "publication", "typed"],
    ),
    ("options", "Options", "How much is too much, and how long to wait.", ["options"]),
    ("history", "History and listening", "What is kept, and what a process reads itself.", ["history", "node"]),
    ("presence", "Presence", "Who is in a channel.", ["presence"]),
    ("streams", "Streams", "Output that outlives its request.", ["streams", "node.streams"]),
    ("stats", "Stats and telemetry", "What a node has counted.", ["stats", "telemetry"]),
    (
        "errors",
        "Errors and codes",
        "What goes wrong, and what clients are told.",
        ["close_codes", "exceptions", "protocols"],
    ),
    ("engines", "Engines", "What links nodes, and what an engine of your own is made of.", ["engines"]),
    ("testing", "Testing", "For tests of apps and of engines: `wsbroadcast.testing`.", ["testing"]),
    ("types", "Types", "For the annotations of your own wrappers.", ["types", ""]),
]

# Public names that are imported from where they are, which their headings say.
_PATH = "    options:\n      show_root_full_path: true\n"
_ELSEWHERE = [
    "engines.redis.RedisEngine",
    "engines.nats.NATSEngine",
    "engines.postgres.PostgresEngine",
    "engines.sqlite.SQLiteEngine",
    "engines.contract.KeepsHistory",
    "engines.contract.KeepsLease",
    "engines.contract.KeepsPresence",
    "engines.contract.Members",
    "engines.broker.BrokerEngine",
    "engines.broker.Inlet",
    "engines.broker.Link",
    "engines.broker.Parcel",
    "engines.broker.reset",
    "engines.broker.history.KeepingEngine",
    "engines.broker.presence.PresenceStore",
    "engines.broker.presence.PresentEngine",
    "engines.broker.link.KeepingLink",
    "engines.broker.link.KeptParcel",
    "engines.broker.link.Keep",
    "engines.broker.link.Place",
    "engines.broker.link.NOWHERE",
    "engines.broker.link.Stretch",
    "engines.broker.link.Entry",
    "history.Appended",
    "history.HistoryRules",
    "telemetry.otel.instrument",
    "telemetry.otel.trace",
    "telemetry.prometheus.CONTENT_TYPE",
    "telemetry.prometheus.StatsCollector",
    "telemetry.prometheus.exposition",
    "types.BroadcastOptions",
    "types.Excludable",
    "types.PublisherOptions",
    "types.PublisherTransactionOptions",
    "types.TransactionOptions",
]


def public_names() -> dict[str, str]:
    """Every public name, as it is imported, with the module that defines it; both without `wsbroadcast.`."""
    package = griffe.load("wsbroadcast", search_paths=[ROOT / "src"])
    paths = {name: getattr(package[name], "target_path", name) for name in _exports(package)}
    return {
        **{name: path.removeprefix("wsbroadcast.").rpartition(".")[0] for name, path in paths.items()},
        **{name: name.rpartition(".")[0] for name in _ELSEWHERE},
        **{f"testing.{name}": "testing" for name in _exports(package["testing"])},
    }


def _exports(module: griffe.Object | griffe.Alias) -> list[str]:
    return [str(name) for name in module.exports or ()]


def reference_page_of(module: str) -> str:
    """The page of the reference that has the public names of a module."""
    fitting = [
        (len(inside), page)
        for page, _, _, modules in _REFERENCE
        for inside in modules
        if not inside or f"{module}.".startswith(f"{inside}.")
    ]
    return max(fitting)[1]


def stage(directory: Path) -> None:
    """Put the pages and the configuration into a directory, which Zensical builds from."""
    pages = directory / "pages"
    pages.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "docs", pages / "docs", ignore=shutil.ignore_patterns("*.md", "*.toml"), dirs_exist_ok=True)
    for source in sources():
        _write(pages / source, _staged(source, pages))
    names = public_names()
    for page, title, _, _ in _REFERENCE:
        mine = [name for name, module in names.items() if reference_page_of(module) == page]
        mine.sort(key=lambda name: name.rpartition(".")[2][0].isupper())  # functions first
        directives = "".join(f"\n::: wsbroadcast.{name}\n{_PATH if '.' in name else ''}" for name in mine)
        _write(pages / f"docs/api/{page}.md", f"# {title}\n{directives}")
    sections = navigation(pages)
    nav = ", ".join(['{ "wsbroadcast" = "README.md" }', *map(str, sections)])
    config = (ROOT / "docs/theme/zensical.toml").read_text(encoding="utf-8")
    _write(directory / "zensical.toml", config.replace("@SRC@", str(ROOT / "src")).replace("@NAV@", f"nav = [{nav}]"))
    _write(pages / "llms.txt", "".join(_llms(sections)))


def sources() -> list[str]:
    """The Markdown files of the repository that are pages."""
    found = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    found += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def _staged(source: str, pages: Path) -> str:
    parts = _FENCE.split((ROOT / source).read_text(encoding="utf-8"))
    parts[::2] = [_LINK.sub(lambda link: _target(link[1], source, pages), part) for part in parts[::2]]
    parts[1::2] = [re.sub(r"\A```(\w+) .*", r"```\1", part) for part in parts[1::2]]  # which GitHub takes no notice of
    return "".join(parts)


def _target(link: str, source: str, pages: Path) -> str:
    """Where a link leads in the site. What isn't a page becomes one; pictures stay what they are."""
    path = (ROOT / source).parent / link
    if re.match(r"\w+:", link) or path.suffix == ".md" or not path.exists():
        return link
    path = path.resolve()
    name = path.relative_to(ROOT)
    if path.suffix in _PICTURES:
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, pages / name)
        return link
    if path.is_dir():
        index = (name / "README.md").as_posix()
        files = "".join(f"* [{each.name}]({_target(each.name, index, pages)})\n" for each in sorted(path.iterdir()))
        if not (path / "README.md").exists():
            _write(pages / index, f"# {name.name}\n\n{files}")
        return f"{link.rstrip('/')}/README.md"
    if name.parts[0] == "src":
        module = ".".join(name.with_suffix("").parts[2:]).removesuffix(".__init__")
        return os.path.relpath(ROOT / f"docs/api/{reference_page_of(module)}.md", (ROOT / source).parent)
    language = _LANGUAGES.get(path.suffix, "text")
    text = path.read_text(encoding="utf-8")
    _write(pages / f"{name}.md", f"# {name.name}\n\n````{language}\n{text.rstrip()}\n````\n")
    return f"{link}.md"


@dataclass
class Section:
    """A heading of the navigation, and what is below it."""

    title: str
    pages: list[Page] = field(default_factory=list)
    below: list[Section] = field(default_factory=list)

    def __str__(self) -> str:
        """As the configuration has it, which is TOML."""
        entries = [f"{{ {json.dumps(page.title)} = {json.dumps(page.path)} }}" for page in self.pages]
        entries += map(str, self.below)
        return f"{{ {json.dumps(self.title)} = [{', '.join(entries)}] }}"


class Page(NamedTuple):
    """A page of the navigation."""

    title: str
    path: str
    summary: str


def navigation(pages: Path) -> list[Section]:
    """The sections of `docs/README.md` with the pages that each lists.

    A page that is the README of a directory brings those that its table lists.
    """
    found = []
    for text in (ROOT / "docs/README.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, rest = text.partition("\n")
        section = Section(title)
        for name, link, summary in re.findall(r"^\* \[([^\]]+)\]\((\S+\.md)\): (.+)$", rest, re.MULTILINE):
            path = os.path.normpath(f"docs/{link}")
            section.pages.append(Page(name, path, summary))
            if path.endswith("/README.md"):
                section.below.append(Section(f"{name}, one by one", _listed(path, pages)))
        if title == "Reference":
            docstrings = [Page(name, f"docs/api/{page}.md", summary) for page, name, summary, _ in _REFERENCE]
            section.below.append(Section("From the docstrings", docstrings))
        found.append(section)
    return found


def _listed(readme: str, pages: Path) -> list[Page]:
    rows = _ROW.findall((pages / readme).read_text(encoding="utf-8"))
    return [Page(name, os.path.normpath(f"{os.path.dirname(readme)}/{link}"), text) for name, link, text in rows]


def _llms(sections: list[Section]) -> Iterator[str]:
    """The index for language models (llmstxt.org)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    yield f"# {project['name']}\n\n> {project['description']}\n"
    for section in sections:
        yield f"\n## {section.title}\n\n"
        for page in [*section.pages, *(page for below in section.below for page in below.pages)]:
            yield f"- [{page.title}]({page.path}): {page.summary}\n"


def _write(path: Path, text: str) -> None:
    """Write a file, unless it says that already: Zensical builds again what has changed."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def zensical(directory: Path, *arguments: str) -> list[str]:
    """The command that does something with what was staged in a directory."""
    return [sys.executable, "-m", "zensical", *arguments, "--config-file", str(directory / "zensical.toml")]


def build(directory: Path) -> str:
    """Build the site anew in `site` of a directory.

    Returns:
        What is wrong: links that lead nowhere, docstrings that can't be read. Empty if all is well.
    """
    shutil.rmtree(directory, ignore_errors=True)
    stage(directory)
    wrong = problems(directory)
    for page in (directory / "pages").rglob("*.md"):  # for who reads Markdown rather than HTML
        _write(directory / "site" / page.relative_to(directory / "pages"), page.read_text(encoding="utf-8"))
    return wrong


def problems(directory: Path) -> str:
    """Build what was staged in a directory, and return what is wrong with it."""
    done = subprocess.run(
        zensical(directory, "build", "--clean", "--strict"), capture_output=True, text=True, timeout=240
    )
    wrong = _COLOUR.sub("", done.stderr).removesuffix("No issues found\n").strip()
    return wrong or (f"Zensical has failed: {done.stdout}" if done.returncode else "")


def _serve(directory: Path, address: str) -> None:
    staged = _changed()
    stage(directory)
    server = subprocess.Popen(zensical(directory, "serve", "--dev-addr", address))
    try:
        while server.poll() is None:
            time.sleep(1)
            if (changed := _changed()) != staged:
                staged = changed
                stage(directory)
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()


def _changed() -> float:
    """When what pages are made of was changed last."""
    places = (ROOT / "docs", ROOT / "examples", ROOT / "src")
    files = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    files += [path for place in places for path in place.rglob("*") if path.suffix != ".pyc"]
    return max(path.stat().st_mtime for path in files)


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="scripts/docs", description="Builds the site of the docs into `site`.")
    parser.add_argument("serve", nargs="?", choices=["serve"], help="serve it, and build again what changes")
    parser.add_argument("--address", default="127.0.0.1:8001", help="where it is served")
    options = parser.parse_args()
    directory = ROOT / "build" / "docs"
    if options.serve:
        _serve(directory, options.address)
        return 0
    wrong = build(directory)
    if wrong:
        print(wrong, file=sys.stderr)
        return 1
    shutil.rmtree(ROOT / "site", ignore_errors=True)
    shutil.copytree(directory / "site", ROOT / "site")
    print(f"Open {ROOT / 'site' / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
