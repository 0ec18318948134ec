"""Start a job on many hosts: a TPU slice, GKE, or local processes. `--help` shows the usage."""

import os
import pathlib
import sys

from launcher.application import main_of_process

if __name__ == "__main__":
    sys.exit(main_of_process(pathlib.Path(__file__).resolve().parent.parent, os.environ))
