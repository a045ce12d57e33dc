"""The public API is the recorded one: no name or signature changes unnoticed, and every name is documented."""

import approx_attention
from approx_attention import METHODS
from docs import names
from tests import public_api


def test_the_public_names_and_signatures_are_those_on_file():
    listed = public_api.LISTING.read_text(encoding="utf-8").splitlines()
    actual = public_api.render().splitlines()
    gone, new = sorted(set(listed) - set(actual)), sorted(set(actual) - set(listed))
    assert listed == actual, (
        f"the public API differs from tests/public_api.txt: gone {gone}, new {new}; "
        "if that is meant, run `python -m tests.public_api` and add a line to CHANGELOG.md"
    )


def test_every_public_name_has_one_page():
    documented = [name.removeprefix("approx_attention.") for name in names.places()]
    top = [name for name in documented if "." not in name]
    assert sorted(top) == sorted(approx_attention.__all__)
    packages = [part for package in names.PACKAGES for part in names.package_names(package)]
    methods = [part for name in METHODS for part in names.method_names(name)]
    assert len(set(packages + methods)) == len(packages + methods)
    assert {part for part in packages + methods if "." not in part} == {*top} - {"METHODS"}  # on the list of methods


def test_every_public_name_has_a_docstring():
    bare = [
        name for name in names.places() if name not in names.DATA and not names.first_line(names.public_object(name))
    ]
    assert not bare
