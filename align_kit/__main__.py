"""`python -m align_kit` is `align-kit`."""

import sys

from align_kit.cli import main

sys.exit(main())
