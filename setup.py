"""Puts the server tree into the wheel as data, so that `pip install 'safelight[local]'` can start the embedded stack.

It goes to safelight/_server/, never to the top level of site-packages: nothing of it can be imported by accident.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

_ROOT = Path(__file__).parent
_SERVER_FOLDERS = ("services", "gateway")


class BuildWithServers(build_py):
    """build_py that also copies the servers; an editable install uses the checkout's own."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in _SERVER_FOLDERS:
            target = Path(self.build_lib) / "safelight" / "_server" / folder
            shutil.copytree(
                _ROOT / folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
            )


setup(cmdclass={"build_py": BuildWithServers})
