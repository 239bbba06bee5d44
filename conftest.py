"""Every test runs in the environment that the stored outputs of the chapters were made in."""

import os

from tools.notebooks import ENVIRONMENT

os.environ.update(ENVIRONMENT)
