"""`python -m diffusers_wadi.cli`."""

import sys

from diffusers_wadi.cli import main

sys.exit(main())
