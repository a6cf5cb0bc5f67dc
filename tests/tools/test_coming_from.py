"""docs/coming_from.md shows the tables of the code."""

from coming_from import PAGE, tables, with_tables


def test_the_tables_of_the_page_are_those_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run `python tests/tools/coming_from.py`"
    assert page.count("<!-- end -->") == len(tables())
