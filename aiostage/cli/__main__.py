"""``python -m aiostage.cli``."""

import sys

from aiostage.cli.main import main

sys.exit(main())
