"""Claimed: a summary names versions, and never fails for want of a package's metadata."""

from importlib.metadata import version

from safereg_dist.models.versions import versions_of


def test_a_package_without_metadata_is_unknown():
    found = versions_of("torch", "no-such-package")
    assert found == {"torch": version("torch"), "no-such-package": "unknown"}
