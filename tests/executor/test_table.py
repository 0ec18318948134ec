from simpo_pipeline.executor.table import format_table


def test_columns_are_aligned_and_numbers_are_right_aligned():
    table = format_table(["step", "tokens", "loss"], [["train-2", "1,024", "0.69"], ["report", "", "1e-05"]])
    assert table.splitlines() == [
        "step     tokens   loss",
        "-------  ------  -----",
        "train-2   1,024   0.69",
        "report           1e-05",
    ]


def test_a_table_without_rows_is_its_header():
    assert format_table(["step", "action"], []).splitlines() == ["step  action", "----  ------"]
