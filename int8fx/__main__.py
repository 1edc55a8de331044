"""``python -m int8fx``: the command."""

import sys

from int8fx.cli.app import main

sys.exit(main())
