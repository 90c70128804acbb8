from gateway.bench.report_tables import FOLDED_ROWS, data_table, table_bars
from gateway.bench.results import Cell, Column, Table

COLUMNS = (
    Column("files", "n"),
    Column("total", "s", lower_is_better=True),
    Column("per_file", "s", lower_is_better=True),
    Column("speedup", "x", lower_is_better=False),
    Column("in_turn_computed", "s"),
    Column("outcome", "key"),
)
ROWS = (
    (Cell(1), Cell(51.0), Cell(51.0), Cell(1.0, "computed"), Cell(51.0, "computed"), Cell("ok")),
    (Cell(5), Cell(397.2), Cell(79.4), Cell(0.64, "computed"), Cell(255.0, "computed"), Cell("ok")),
    (
        Cell(10),
        Cell(None, note="until_last_failure"),
        Cell(None),
        Cell(None, "computed"),
        Cell(510.0, "computed"),
        Cell("ok"),
    ),
)
TABLE = Table("vision_batch", COLUMNS, ROWS)


def test_the_table_of_the_seed_has_its_units_marks_and_texts() -> None:
    table = data_table(TABLE, "ko")
    assert table.title == "파일 수별 결과"
    assert [cell.text for cell in table.rows[1]] == ["5", "397.2초", "79.40초", "0.64배", "255초", "정상"]
    assert [cell.kind for cell in table.rows[1]][3:5] == ["computed", "computed"]
    assert table.numeric == {0, 1, 2, 3, 4}


def test_a_missing_value_is_a_dash_with_its_reason() -> None:
    cell = data_table(TABLE, "en").rows[2][1]
    assert (cell.text, cell.note, cell.look) == ("–", "until the last failure", "absent")
    assert data_table(TABLE, "en").rows[2][2].note == ""


def test_a_long_table_is_folded() -> None:
    assert data_table(Table("t", COLUMNS, ROWS[:1] * (FOLDED_ROWS + 1)), "en").folded
    assert not data_table(TABLE, "en").folded


def test_speed_up_time_and_time_per_file_become_pictures() -> None:
    speedup, total, per_file = table_bars(TABLE, "en")
    assert [bar.value for _, group in speedup.groups for bar in group] == [1.0, 0.64, None]
    assert speedup.hint == "A longer bar is better."
    assert [[(bar.value, bar.kind) for bar in group] for _, group in total.groups][1] == [
        (397.2, "measured"),
        (255.0, "computed"),
    ]
    assert [name for name, _ in total.groups] == ["files 1", "files 5", "files 10"]
    assert per_file.hint == "A shorter bar is better."


def test_the_time_of_a_batch_that_failed_is_no_bar() -> None:
    """Beside the others it would look fast: 20 files that failed after 12 s, and 20 s one after the other."""
    failed = (
        Cell(20),
        Cell(12.0, note="until_last_failure"),
        Cell(None),
        Cell(None),
        Cell(20.0, "computed"),
        Cell("ok"),
    )
    _, total, _ = table_bars(Table("vision_batch", COLUMNS, (*ROWS, failed)), "en")
    bars = total.groups[-1][1]
    assert [(bar.value, bar.shown) for bar in bars] == [(None, "12.00 s, until the last failure"), (20.0, "20.00 s")]


def test_a_table_of_one_row_or_without_such_columns_has_no_picture() -> None:
    assert table_bars(Table("t", COLUMNS, ROWS[:1]), "en") == []
    assert table_bars(Table("t", COLUMNS[:1], tuple(row[:1] for row in ROWS)), "en") == []


def test_a_forecast_in_seconds_is_a_bar_beside_what_was_measured_and_computed() -> None:
    """The plan of the seed's report: 5 files in 35 s, where one after the other would be 255 s."""
    columns = (*COLUMNS[:2], COLUMNS[4], Column("forecast"))
    rows = tuple(
        (*row[:2], row[4], Cell(plan, "forecast")) for row, plan in zip(ROWS, ("25", "35s", "5-10"), strict=True)
    )
    [total] = table_bars(Table("vision_batch", columns, rows), "en")
    assert [(bar.value, bar.kind) for bar in total.groups[1][1]] == [
        (397.2, "measured"),
        (255.0, "computed"),
        (35.0, "forecast"),
    ]
    assert total.groups[2][1][2].value is None
