"""``python -m tokcx_lib`` is ``tokcx``."""

import sys

from tokcx_lib.cli import main

sys.exit(main())
