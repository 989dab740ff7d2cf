from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_links_and_included_code_are_right() -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_the_plugin_of_the_readme_is_explained_as_it_says(tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(# my_kernels\.py.*?)```", page, re.DOTALL)
    shown = re.search(r"\$ kernelforge (why .*)\n((?:.*\n)*?)```", page)
    assert code
    assert shown
    (tmp_path / "my_kernels.py").write_text(code[1], encoding="utf-8")
    info = tmp_path / "kernelforge_my_kernels-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: kernelforge-my-kernels\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[kernelforge]\nmy-kernels = my_kernels\n")
    environment = {
        "PYTHONPATH": str(tmp_path),
        "KERNELFORGE_PLUGINS": "cpu,my-kernels",
        "KERNELFORGE_HOME": str(tmp_path),
    }
    ran = subprocess.run(
        [sys.executable, "-m", "kernelforge", *shlex.split(shown[1])],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert (ran.returncode, ran.stdout) == (0, shown[2]), ran.stderr


def test_pages_are_rendered(tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "docs" / "build.py"), "--out", str(tmp_path)]
    ran = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    rendered = {page.stem for page in tmp_path.glob("*.html")}
    assert rendered >= {page.stem for page in (ROOT / "docs").glob("*.md")}
    page = (tmp_path / "performance.html").read_text(encoding="utf-8")
    links = re.findall('href="#([^"]+)"', page)
    assert links
    assert set(links) <= set(re.findall('<h[1-6] id="([^"]+)"', page))
