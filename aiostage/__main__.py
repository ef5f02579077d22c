"""``python -m aiostage`` is the command ``aiostage``."""

import sys

from aiostage.cli.main import main

sys.exit(main())
