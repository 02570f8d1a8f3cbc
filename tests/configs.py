"""The YAML files of configs/, as tests see them: runs, and studies made of many runs."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted(ROOT.glob("configs/ablations/*.yaml"))  # for scripts.ablate
SCALES = sorted(ROOT.glob("configs/ablations/scales/*.yaml"))  # the runs that they are made of
CONFIGS = sorted(path for path in ROOT.glob("configs/**/*.yaml") if path not in STUDIES)  # every run's
