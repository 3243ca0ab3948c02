"""``python -m tinyclip``: the command line, also where the script is not on PATH."""

import sys

from tinyclip.cli import main

sys.exit(main())
