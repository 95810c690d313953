"""The same as tools.benchmark --mode scaling: python -m tools.estimate."""

import sys

from tools.benchmark.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["--mode", "scaling"]
    main()
