from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_links_and_included_code_are_right() -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_pages_are_rendered(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), "--out", str(tmp_path)], check=True, capture_output=True
    )
    rendered = {page.stem for page in tmp_path.glob("*.html")}
    assert rendered >= {page.stem for page in (ROOT / "docs").glob("*.md")}
