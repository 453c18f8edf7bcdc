"""Files that are complete or absent: written under a temporary name, then renamed."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file in one piece or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_jsonl(path: str | os.PathLike, records: Sequence[dict[str, Any]]) -> None:
    """`write_text` of one JSON object a line."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
