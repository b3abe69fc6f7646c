"""``python -m picnn_fast`` is ``picnn-fast``."""

import sys

from picnn_fast.cli import main

sys.exit(main())
