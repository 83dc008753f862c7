"""`python -m lopd.cli`, the same as the `lopd` command."""

import sys

from lopd.cli import main

sys.exit(main())
