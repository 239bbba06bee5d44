"""A record or checkpoint that was damaged, or is another's, is refused in one sentence: which, and what is wrong."""

import gzip
import hashlib
import json

import numpy as np
import pandas as pd
import pytest

from tokcx_lib import cli, records
from tokcx_lib.studies import registry, runs

DEEP = 100_000


def plan(config, device):
    def work(replicate):
        return runs.Part(pd.DataFrame({"replicate": replicate, "n": config["lengths"], "error": 0.5}))

    return runs.Plan([(r,) for r in range(config["replicates"])], work, {"texts": {"novel": "aa11"}})


SMALL = runs.Experiment(plan, ("replicate",), {"replicates": 4, "lengths": [10, 20]}, {"replicates": 2})


@pytest.fixture
def folder(tmp_path):
    runs.run("small", SMALL, path=tmp_path)
    assert runs.verify("small", SMALL, path=tmp_path).difference == 0
    return tmp_path


def refused(folder, *words):
    with pytest.raises(ValueError) as error:
        runs.verify("small", SMALL, path=folder)
    said = str(error.value)
    assert said.startswith("record 'small': ") and all(word in said for word in words) and len(said) < 300, said


@pytest.mark.parametrize(
    "key, value",
    [
        ("format", 2),
        ("format", [1]),
        ("name", {"small": 1}),
        ("columns", "replicate,n,error"),
        ("columns", [1, 2, 3]),
        ("columns", {}),
        ("rows", "8"),
        ("rows", True),
        ("rows", -8),
        ("sha256", 17),
        ("sha256", "17"),
        ("created", 2026),
        ("versions", ["torch"]),
        ("versions", {"torch": 2}),
        ("commit", None),
        ("device", {}),
        ("config", [["replicates", 4]]),
        ("config", "replicates"),
        ("config", {"replicates": 10**20}),
        ("config", {"replicates": "4"}),
        ("config", {"replicates": 0}),
        ("config", {"lengths": 10}),
        ("config", {"lengths": [10, -20]}),
        ("config", {"colour": "red"}),
        ("texts", ["novel"]),
        ("texts", {"novel": ["aa11"]}),
        ("texts", "novel"),
        ("replicates", [4]),
        ("units", 0.5),
        ("unit_seconds", "1"),
        ("unit_seconds", -1),
        ("unit_seconds", 10**400),
        ("wall_seconds", None),
    ],
)
def test_a_wrong_value_of_the_metadata_is_named(folder, key, value):
    path = folder / "small.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    refused(folder, {"format": "of format", "name": "named", "config": "config: "}.get(key, f"{key}: expected"))


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("null", "expected a mapping, got None"),
        ("[]", "expected a mapping, got []"),
        ("[" * DEEP + "]" * DEEP, "cannot be read"),
        ('{"config": ' * DEEP + "0" + "}" * DEEP, "cannot be read"),
        ("[" * 900 + "]" * 900, "expected a mapping"),
        ('{"format": 1}', "lacks name, columns"),
        ('{"rows": NaN}', "NaN is no JSON"),
        ('{"rows": -Infinity}', "-Infinity is no JSON"),
        ('{"rows": ' + "9" * 10_000 + "}", "cannot be read"),
        ("\xff\xfe", "cannot be read"),
    ],
    ids=str.__len__,
)
def test_metadata_that_are_no_json_of_a_record(folder, text, word):
    (folder / "small.json").write_bytes(text.encode("latin-1"))
    refused(folder, word)


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_beyond_all_bounds(folder, number):
    path = folder / "small.json"
    path.write_text(path.read_text().replace('"unit_seconds": ', f'"unit_seconds": {number}, "was": '))
    refused(folder, "unit_seconds: expected")


@pytest.mark.parametrize(
    "suffix, content, word",
    [
        (".csv", b"", "cannot be read"),
        (".csv", b"\x00\xff" * 100, "small.csv"),
        (".csv", b'replicate,n,error\n0,10,"0.5\n', "cannot be read"),
        (".csv", b"replicate,n,error\n0,10,0.5,1,2\n0,10\n" * 4, "expected"),
        (".csv", b"replicate,n,error\n0,10,0.5\n", "expected 8 rows"),
        (".csv", b"replicate,n,error\n" + b"zero,ten,half\n" * 8, "0 rows"),
        (".csv.gz", gzip.compress(b"replicate,n,error\n" + b"0,10,0.5\n" * 8)[:-12], "cannot be read"),
        (".csv.gz", b"replicate,n,error\n" + b"0,10,0.5\n" * 8, "cannot be read"),
        (".csv.gz", gzip.compress(b"0" * 1000)[:10] + b"\xff" * 20, "cannot be read"),
    ],
)
def test_a_table_that_is_none_though_its_checksum_is_right(folder, suffix, content, word):
    (folder / "small.csv").unlink()
    (folder / ("small" + suffix)).write_bytes(content)
    meta = json.loads((folder / "small.json").read_text())
    (folder / "small.json").write_text(json.dumps({**meta, "sha256": hashlib.sha256(content).hexdigest()}))
    refused(folder, word)


def test_text_where_numbers_were_measured(folder):
    table, meta = records.load("small", folder)
    records.save("small", table.assign(error=["half"] * 8), meta, folder)
    refused(folder, "error: expected numbers")


def test_a_record_under_another_name(folder, monkeypatch, capsys):
    for suffix in (".json", ".csv"):
        (folder / ("small" + suffix)).rename(folder / ("other" + suffix))
    for name in ("small", "other", "oth*r", "../" + folder.name + "/other", "", "o" * 300, "a\0b"):
        with pytest.raises(ValueError, match="^record"):
            runs.verify(name, SMALL, path=folder)
    # Renamed inside, too: another experiment's configuration and columns are not there.
    table, meta = pd.read_csv(folder / "other.csv"), json.loads((folder / "other.json").read_text())
    records.save("other", table, meta, folder)
    other = runs.Experiment(plan, ("replicate",), {"replicates": 4, "lengths": [10, 30]}, {})
    with pytest.raises(ValueError, match="^record 'other': config: lengths: expected"):
        runs.verify("other", other, path=folder)
    with pytest.raises(ValueError, match="^record 'other': its table lacks scale"):
        runs.verify("other", SMALL._replace(keys=("replicate", "scale")), path=folder)
    monkeypatch.setitem(registry.EXPERIMENTS, "other", other)
    assert cli.main(["verify", "other", "--out", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "change, word",
    [
        ("", "cannot be read"),
        ("[1]", "expected a mapping"),
        ("[" * DEEP, "cannot be read"),
        ({"config": ["replicates"]}, "config: expected a mapping"),
        ({"config": None}, "config: expected a mapping"),
        ({"sessions": []}, "sessions: expected"),
        ({"sessions": {}}, "sessions: expected"),
        ({"sessions": [3]}, "sessions: expected"),
        ({"sessions": [{"commit": "a"}]}, "sessions: expected"),
        ({"finished": "no"}, "finished: expected"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_damaged_description_of_checkpoints_is_refused_and_nothing_is_lost(folder, change, word, resume):
    state = folder / "small.parts" / "run.json"
    state.write_text(change if isinstance(change, str) else json.dumps({**json.loads(state.read_text()), **change}))
    with pytest.raises(ValueError, match=f"^run: .*small.parts.run.json was damaged; .*{word}"):
        runs.run("small", SMALL, resume=resume, path=folder)
    assert len(list(state.parent.glob("*.csv"))) == 4


def test_a_description_without_its_sessions(folder):
    state = folder / "small.parts" / "run.json"
    state.write_text(json.dumps({"config": SMALL.full, "finished": False}))
    with pytest.raises(ValueError, match="^run: .* lacks sessions"):
        runs.run("small", SMALL, resume=True, path=folder)
    assert np.isfinite(runs.verify("small", SMALL, path=folder).difference)  # the record itself is whole


UNIT = b"""replicate,n,error
1,10,0.25
1,20,0.5
"""


def test_a_unit_that_an_earlier_version_left_is_gone_on_from(folder):
    """Rows, then a line with their checksum and the seconds that they took: as it was from the first version on."""
    seal = f"# {hashlib.sha256(UNIT).hexdigest()} 0.125 s\n".encode()
    unit = folder / "small.parts" / "1.csv"
    unit.write_bytes(UNIT + seal)
    runs.run("small", SMALL, resume=True, path=folder)
    assert records.load("small", folder).table["error"].tolist() == [0.5, 0.5, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5]
    for damaged in (UNIT, UNIT + seal[:-1], UNIT + seal.replace(b"0.125", b"soon"), UNIT.replace(b"20", b"30") + seal):
        unit.write_bytes(damaged)
        with pytest.raises(
            ValueError, match="^record 'small': its checkpoint .*1.csv was damaged or edited; delete it"
        ):
            runs.run("small", SMALL, resume=True, path=folder)
