"""``python -m int8fx``: the command."""

import sys

from int8fx.cli import main

sys.exit(main())
