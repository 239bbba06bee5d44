"""Every test runs in the environment that the stored outputs of the chapters were made in.

Under pytest-xdist (`make test`) a file of tests, or a chapter, is one worker's, from its first test to its last; the
tests of the book, which build it, are one worker's all together, and so are those that load the language model.
"""

import os

import pytest

from tools.notebooks import ENVIRONMENT

os.environ.update(ENVIRONMENT)


def home(test: str) -> str:
    """The tests that one worker runs all together, by the name of one of them."""
    file = test.split("::")[0]
    for together in ("tests/book/", "tests/test_language_"):
        if file.startswith(together):
            return together
    return file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByHome(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return home(nodeid)

    return ByHome(config, log)
