"""What `make check-lowest` installs follows from pyproject.toml and requirements.txt alone."""

from tools import lowest


def test_lowest_versions_and_the_rest_as_pinned(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = [\n  "numpy>=2.0",  # why\n  "torch>=2.11",\n]\n'
    )
    (tmp_path / "requirements.txt").write_text("# All.\n-r other.txt\n\nnumpy==2.4.6\npytest==9.2.0\ntorch==2.13.0\n")
    assert lowest.requirements(tmp_path) == ["numpy==2.0", "torch==2.11", "pytest==9.2.0"]


def test_every_dependency_has_a_lowest_version():
    found = lowest.requirements()
    assert len(found) >= 8 and all(line.count("==") == 1 and not set(line) & set("<>~!;") for line in found)
    assert {"transformers", "torch", "pytest", "hypothesis"} <= {line.partition("==")[0] for line in found}
