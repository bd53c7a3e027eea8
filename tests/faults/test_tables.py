"""Tables after stops and damage: no row is lost, doubled or torn, and what is damaged is named."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.messages import stops
from tests.helpers.small_run import (
    EVALUATION,
    content,
    left_at_20,
    logged,
    metrics,
    restore,
    save,
    sums,
    table,
)


def test_another_column(run):
    """A changed script with another metric does not write under the old names."""
    first = run()
    restore(first)
    first.tables.log("eval.csv", 20, dict(success=np.ones(3)))
    before = (first.folder / "eval.csv").read_bytes()
    log = lambda: first.tables.log("eval.csv", 40, dict(success=np.ones(3), best=np.ones(3)))
    stops("has the columns ['success'], not", "another --name", call=log)
    assert (first.folder / "eval.csv").read_bytes() == before


def test_a_first_row_that_cannot_be_read(run):
    """In a table without metrics, too."""
    first = run()
    (first.folder / "train.csv").write_text("task,seed,step\nx,y,z\n")
    stops("train.csv", "line 2 is damaged: 'x,y,z'", call=lambda: first.tables.continue_from(0))


def test_an_evaluation_alone_of_an_earlier_checkpoint(run):
    """Its rows take the place of those of the checkpoint that was lost, and more may follow."""
    first = run()
    for step in (20, 10, 10):
        first.tables.plan_cut("eval_only.csv", step)
        first.tables.log("eval_only.csv", step, metrics())
    assert [row[2] for row in table(first.folder / "eval_only.csv")[1:]] == ["10"] * 6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_stop_the_run(run, bad, capsys):
    """An agent that has such numbers is named once and is lost; when all are, the line names
    metric, task, seed, step and folder, and nothing is logged."""
    first, values = run(), metrics()
    values["q"] = np.array([0, 0, bad])
    save(first, 5)
    for step in (5, 10):
        first.tables.log("train.csv", step, values)
    (line,) = capsys.readouterr().err.split("\n")[1:-1]
    lost = "q of task 4, seed 0 is not finite at step 5"
    assert line == f"{lost}: this agent is lost, the others go on"
    last_column = [row[-1] for row in table(first.folder / "train.csv")[1:]]
    assert last_column == ["0.0", "0.0", str(bad)] * 2
    before = {path: path.read_bytes() for path in first.folder.iterdir()}
    values["loss"] = np.array([bad, 0, 0])
    values["q"] = np.array([0, bad, 0])  # the last one, in the order of the metrics
    words = "q of", "task 1", "seed 1", "step 15", first.folder
    stops(*words, call=lambda: first.tables.log("train.csv", 15, values))
    assert before == {path: path.read_bytes() for path in first.folder.iterdir()}


@pytest.mark.parametrize("name", ["train.csv", "eval.csv"])
def test_rows_after_the_checkpoint_are_dropped(run, name):
    """Those before it are kept byte for byte, and the log goes on as if nothing had happened."""
    folder, contents = logged(run, name)
    second = run()
    assert restore(second)[0] == 20
    second.tables.log(name, 30, metrics(30))
    (folder / "whole").write_bytes(contents[2])
    continued, whole = ([row[:3] + row[4:] for row in table(folder / x)] for x in (name, "whole"))
    assert continued == whole


def test_a_continued_log_has_no_row_twice_or_missing(run):
    """Read as a table."""
    folder, _ = logged(run)
    second = run()
    restore(second)
    for step in (30, 40):
        second.tables.log("train.csv", step, metrics(step))
    head, *rows = table(folder / "train.csv")
    assert [int(row[2]) for row in rows] == [10] * 3 + [20] * 3 + [30] * 3 + [40] * 3
    assert all(len(row) == len(head) for row in rows)


def test_without_a_checkpoint_the_log_begins_again(run):
    first = run()
    first.tables.log("train.csv", 10, metrics())
    folder = first.folder
    del first
    second = run()
    step, found = second.restore(content(7) | dict(metrics=sums()))
    assert step == 0 and found["state"].params["x"][0, 0] == 7 and found["replay"] == {}
    second.tables.log("train.csv", 10, metrics())
    assert len(table(folder / "train.csv")) == 4 and table(folder / "train.csv")[0][0] == "task"


def test_a_torn_line_is_dropped(run):
    """Wherever the last rows were cut off, the ones before the checkpoint come back."""
    folder, contents = logged(run)
    second = run()
    for cut in range(len(contents[1]), len(contents[2])):
        (folder / "train.csv").write_bytes(contents[2][:cut])
        restore(second)
        second.tables.log("train.csv", 30, metrics(30))
        rows = table(folder / "train.csv")
        assert [row[2] for row in rows[1:]] == ["10"] * 3 + ["20"] * 3 + ["30"] * 3, cut


@pytest.mark.parametrize("torn", ["", "task,seed,st", "task,seed,step,seconds,loss,q"])
def test_a_torn_header_is_written_again(run, torn):
    """As after a full disk, when the file was created and nothing could be written into it."""
    folder = run().folder
    (folder / "train.csv").write_text(torn)
    second = run()
    restore(second)
    second.tables.log("train.csv", 10, metrics())
    head, *rows = table(folder / "train.csv")
    assert head == ["task", "seed", "step", "seconds", "loss", "q"] and len(rows) == 3


@pytest.mark.parametrize("bad", [b"1,0,x,0.1,0.5,0.5", b"1,1", b"\xff"])
def test_a_damaged_row(run, bad):
    """A row that is not the last and has no step: one line that names the file, which stays."""
    folder, contents = logged(run)
    damaged = contents[1].replace(b"\n1,1,10,", b"\n" + bad + b"\n1,1,10,")
    (folder / "train.csv").write_bytes(damaged)
    stops(folder, "train.csv", call=lambda: restore(run()))
    assert (folder / "train.csv").read_bytes() == damaged


@pytest.mark.parametrize("step", ["90", "1e1", "10.5", "-10", "inf", "nan"])
def test_a_damaged_step(run, step):
    """Also one that is a number: steps are whole and never decrease."""
    folder, contents = logged(run)
    rows = contents[1].decode().replace(",10,", f",{step},")
    (folder / "train.csv").write_text(rows)
    stops(folder, "train.csv", "is damaged", call=lambda: restore(run()))
    assert (folder / "train.csv").read_text() == rows


def test_rows_of_some_agents_alone_are_dropped(run):
    """An evaluation is logged after its checkpoint: stopped within its rows, it is not there."""
    first = run()
    for step in (10, 20):
        first.tables.log("eval.csv", step, metrics(step))
    path = first.folder / "eval.csv"
    lines = path.read_text().splitlines(keepends=True)
    for rows in range(4, 8):
        path.write_text("".join(lines[:rows]))
        first.tables.continue_from(20)
        assert first.tables.last_row["eval.csv"] == (20 if rows == 7 else 10)
        first.tables.log("eval.csv", 30, metrics())
        kept = path.read_text().splitlines(keepends=True)[:-3]
        assert kept == lines[: 7 if rows == 7 else 4]


def test_a_torn_row_of_an_evaluation_alone(run):
    """Is dropped by the next --eval-only, as the rows of the other tables are."""
    folder = left_at_20(run)
    for _ in range(2):
        again = run(eval_only=True)
        restore(again)
        again.log_evaluation(20, EVALUATION)
        again.finish()
        again.lock.close()
        path = folder / "eval_only.csv"
        path.write_bytes(path.read_bytes()[:-3])
    lines = table(path)
    assert len(lines) == 4 and {len(line) for line in lines} == {len(lines[0])}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_stops_the_log_in_one_line(run):
    first = run()
    (first.folder / "train.csv").symlink_to("/dev/full")
    words = "train.csv", first.folder, "No space left on device"
    stops(*words, call=lambda: first.tables.log("train.csv", 10, metrics()))
