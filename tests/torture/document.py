"""The generated blocks of docs/reliability.md."""

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"


def write_blocks(blocks: dict[str, str]) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->`."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
        assert pattern.search(text), name
        text = pattern.sub(lambda _, s=start, b=block, e=end: f"{s}\n\n{b}\n\n{e}", text)
    DOCUMENT.write_text(text, encoding="utf-8")
