"""Check that the web pages which this repository's pages link to still exist: `python -m tests.web_links [FOLDER]`."""

import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
GONE = {404, 410}
TIMEOUT_SECONDS = 30.0


def web_links(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each link to the web in the Markdown pages below `folder`, hidden folders other than .github left out."""
    for page in sorted(folder.rglob("*.md")):
        parts = page.relative_to(folder).parts
        if not any(part.startswith(".") and part != ".github" for part in parts):
            for link in re.findall(r"\]\((https?://[^)\s]+)\)", page.read_text(encoding="utf-8")):
                yield page, link


def link_problem(link: str) -> str | None:
    """Why `link` leads nowhere; None if it works or the server only refuses programs or is busy."""
    request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}" if error.code in GONE else None
    except OSError as error:
        return str(error)


def main(folder: Path = ROOT) -> int:
    """Print dead links; return 1 if there are any."""
    pages: dict[str, list[str]] = {}
    for page, link in web_links(folder):
        pages.setdefault(link, []).append(str(page.relative_to(folder)))
    problems = {link: problem for link in pages if (problem := link_problem(link))}
    for link, problem in problems.items():
        print(f"{', '.join(sorted(set(pages[link])))}: {link}: {problem}")
    print(f"{len(pages)} links, {len(problems)} dead")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
