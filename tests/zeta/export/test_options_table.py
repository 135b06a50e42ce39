"""The tables of docs/export.md are those of the code that exports and imports."""

from pathlib import Path

from zeta.export.options_table import markdown

PAGE = Path(__file__).parents[3] / "docs/export.md"


def test_the_documents_show_the_tables_of_the_code():
    marked = PAGE.read_text().partition("<!-- python -m zeta.export.options_table -->")[2]
    assert marked.partition("<!-- end -->")[0].strip() == markdown().strip()


def test_the_tables_follow_what_is_refused():
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in markdown().splitlines()
            if line.startswith("| `")}  # fmt: skip
    assert [cell.strip() for cell in rows["`pooler`"]] == ["false"] * 4
    assert rows["`norm_eps`"][0].strip() == "1e-06"
    assert [cell.strip() for cell in rows["`rope_coordinates`"][1:]] == ["separate", "none", "none"]
    assert rows["`dinov3_vit`"] == [" DINOv3ViTModel "]
