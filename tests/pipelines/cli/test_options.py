import json

from pipelines.cli.options import print_json


def test_what_json_has_no_number_for_becomes_null_on_one_line(capsys):
    print_json({"auroc": float("nan"), "limits": [float("inf"), -float("inf"), 0.5], "name": "grün"})
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert json.loads(printed) == {"auroc": None, "limits": [None, None, 0.5], "name": "grün"}
    assert "grün" in printed
