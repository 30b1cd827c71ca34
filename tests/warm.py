"""What the process behind `tests/command.py` does once, so that no command has to: imports, and reading source."""

import os

for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)  # left behind by pytest; a console that is made now would keep its width

from speedrun_lib.cli import export_script  # noqa: E402
from speedrun_lib.recipe import LADDER  # noqa: E402

for rung in ("muon", LADDER[-1].name):
    export_script(rung)  # every run writes its script into its log
