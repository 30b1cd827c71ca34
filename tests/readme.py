"""README.md from nbs/index.ipynb: `python -m tests.readme` writes it, `--check` fails when it is out of step."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Path("nbs/images/history.svg")


def render(notebook: dict) -> tuple[str, str]:
    "Markdown of the notebook's text cells, its one picture as a link; and that picture."
    parts, picture = ["<!-- made from nbs/index.ipynb by `python -m tests.readme`; edit that notebook -->"], ""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append("".join(cell["source"]))
        for output in cell.get("outputs", []):
            svg = output.get("data", {}).get("image/svg+xml")
            if svg:
                picture = "".join(svg)
                parts.append(f"![All records of the speedrun]({PICTURE.as_posix()})")
    text = "\n\n".join(parts) + "\n"
    for name in (path.name for path in (ROOT / "nbs").glob("*.ipynb")):
        text = text.replace(f"]({name})", f"](nbs/{name})")
    return text, picture + "\n"


def main() -> int:
    "Write or compare; returns the exit code."
    text, picture = render(json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8")))
    targets = {ROOT / "README.md": text, ROOT / PICTURE: picture}
    if "--check" in sys.argv:
        stale = [str(p.relative_to(ROOT)) for p, s in targets.items() if not p.exists() or p.read_text("utf-8") != s]
        if stale:
            print(f"error: {', '.join(stale)} not made from this nbs/index.ipynb; run python -m tests.readme",
                  file=sys.stderr)
        return len(stale)
    for path, content in targets.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
