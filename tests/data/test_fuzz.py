"""A few thousand broken rows and files; `make fuzz` tries a hundred thousand."""

from fuzz_rows import run


def test_every_row_of_a_broken_file_is_accounted_for():
    found = run(2500)
    assert found["files"] == 2500
    assert found["read"] == found["kept"] + found["bad"]
    assert min(found["kept"], found["bad"], found["refused"]) > 500
