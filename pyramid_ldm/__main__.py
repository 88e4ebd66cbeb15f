"""`python -m pyramid_ldm`, the same as `pyramid-ldm`."""

import sys

from pyramid_ldm.cli import main

if __name__ == "__main__":
    sys.exit(main())
