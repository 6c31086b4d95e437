"""Run a command where the host name and what is mounted are its own: a machine with a fault, for a moment."""

from __future__ import annotations

import subprocess

import pytest

from tests.harness import ROOT


def apart(script: str) -> str:
    """Run a shell script as root of its own host name and mounts and return what it prints.

    The test skips where that is not allowed.
    """
    try:
        allowed = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("no namespaces of one's own here")
    words = ["unshare", "--uts", "--mount", "bash", "-ec", script]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
