"""``python -m aiostage`` is the command ``aiostage``."""

import sys

from aiostage_command import main

sys.exit(main())
