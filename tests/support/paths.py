"""Places in the repository."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).parent
"""Helpers of tests; on PYTHONPATH where processes import a session by name."""

ROOT = SUPPORT.parent.parent
EXAMPLES = ROOT / "examples"
DOCS = ROOT / "docs"
