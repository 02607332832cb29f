import sys

from torchrec_lma.cli import main

if __name__ == "__main__":
    sys.exit(main())
