"""Check a built site as a reader without a network meets it: what is linked is there, nothing is loaded from outside.

    python docs/check_site.py build/docs
    python docs/check_site.py build/docs --gallery  # and every script of the gallery has drawn something

Looks at every page: the files and the anchors that its links lead to, and its pictures, scripts and styles.
"""

import argparse
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

LOADED = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "modulepreload", "manifest"}
DRAWN = re.compile(r"sphx_glr_.*_\d{3}")  # as sphinx-gallery calls the figures of a script, but not the thumbnails


class Page(HTMLParser):
    """The anchors of a page, what it links to and what it loads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the anchors, links and loads of a tag."""
        given = {name: value for name, value in attrs if value is not None}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and "href" in given:
            is_loaded = LOADED & set(given.get("rel", "").split())
            (self.loads if is_loaded else self.links).append(given["href"])
        if tag != "a":
            self.loads += [given[name] for name in ("src", "data", "poster") if name in given]
            self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]


def problems_of(site: Path, counts: Counter[str]) -> list[str]:
    """Return what is wrong on the pages of ``site``, a line each; ``counts`` gets what was looked at."""
    pages = {file.resolve(): Page(file) for file in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site} has no pages"]
    for file, page in pages.items():
        where = file.relative_to(site.resolve())
        counts["pages"] += 1
        counts["pictures"] += sum(Path(urlsplit(source).path).suffix in {".png", ".svg"} for source in page.loads)
        for kind, targets in (("loads", page.loads), ("links to", page.links)):
            for target in targets:
                path, anchor = urldefrag(target)
                if urlsplit(target).scheme or target.startswith("//"):
                    if kind == "loads" and not target.startswith("data:"):
                        found.append(f"{where} loads {target} from outside")
                    continue
                counts["internal links"] += 1
                goal = (file.parent / unquote(urlsplit(path).path)).resolve() if path else file
                if not goal.is_file():
                    found.append(f"{where} {kind} {target}, which is not there")
                elif anchor and goal in pages and unquote(anchor) not in pages[goal].anchors:
                    found.append(f"{where} {kind} {target}, which has no such anchor")
    for file in sorted(site.rglob("*.css")):
        for source in re.findall(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", file.read_text()):
            found.append(f"{file.relative_to(site)} loads {source} from outside")
    return found


def problems_of_gallery(site: Path, scripts: list[Path], counts: Counter[str]) -> list[str]:
    """Return which of the ``scripts`` have drawn nothing on their pages in ``site``."""
    found = []
    for script in scripts:
        page = site / "auto_gallery" / f"{script.stem}.html"
        loads = Page(page).loads if page.is_file() else []
        drawn = {source for source in loads if DRAWN.search(source) and "thumb" not in source}
        counts["scripts of the gallery"] += 1
        counts["figures drawn by them"] += len({source.replace("_2_00x", "") for source in drawn})
        if not drawn:
            found.append(f"{script} has drawn nothing: {page} has no figure of it")
    return found


def main() -> None:
    """Print what is wrong and what was looked at; exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="the folder with the built pages")
    parser.add_argument("--gallery", action="store_true", help="also check that every script was run")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    found = problems_of(arguments.site, counts)
    if arguments.gallery:
        scripts = sorted((Path(__file__).parent / "gallery").glob("plot_*.py"))
        found += problems_of_gallery(arguments.site, scripts, counts)
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    print(", ".join(f"{number:,} {what}" for what, number in counts.items()) + f": {len(found)} problems")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
