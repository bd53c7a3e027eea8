"""Pictures and tables of what is missing or damaged, and of what must not be overwritten."""

import errno

import numpy as np
from matplotlib.figure import Figure

from plot import Options, main
from tests.helpers.messages import stops
from tests.helpers.plotted import run_folder


def test_only_pictures_that_exist_are_named(tmp_path, capsys):
    """A run that has just begun has none; the maze's and the curve are named in turn."""
    run = run_folder(tmp_path, env="pointmaze-medium", tasks=(1,), seeds=(0,))
    rows = (run / "eval.csv").read_text()
    (run / "eval.csv").unlink()
    main(Options(paths=(str(run),)))
    assert capsys.readouterr().out == f"{run} has nothing to draw yet\n"
    assert not any(run.glob("*.png"))
    (run / "eval.csv").write_text(rows)
    np.savez(run / "rollouts.npz", task=[1], success=[[1]], path0=np.ones((3, 2)))
    main(Options(paths=(str(run),)))
    drawn = [f"{run}/{name}.png" for name in ("rollouts", "curve")]
    assert capsys.readouterr().out.splitlines() == [f"drew {name}" for name in drawn]
    assert sorted(map(str, run.glob("*.png"))) == sorted(drawn)


def test_what_cannot_be_done(tmp_path):
    """One line each, and nothing is written."""
    run = run_folder(tmp_path / "runs")
    table = tmp_path / "a.csv"
    table.write_text("task,seed,step,success\n1,0,x,1\n")
    both = str(run), str(run_folder(tmp_path / "runs", "fql", "scene"))
    damaged = run_folder(tmp_path / "other")
    (damaged / "config.json").write_text("{")
    rotten = run_folder(tmp_path / "rotten", env="pointmaze-medium")
    (rotten / "rollouts.npz").write_bytes(b"PK")
    torn = run_folder(tmp_path / "torn")
    (torn / "eval.csv").write_text("task,seed,step,success\n1,0,100,x\n")
    (tmp_path / "file").write_text("")
    out, picture = str(tmp_path / "out.png"), tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    for words, flags in [
        ("is not a run folder", dict(paths=(str(tmp_path / "nothing"),))),
        ("is not a run folder", dict(paths=(str(tmp_path),), out=out)),
        ("no method has all tasks of a panel", dict(paths=both, out=out, by="all")),
        ("Put them before the flags", dict()),
        ("is not a CSV file that can be read", dict(paths=(str(picture),), out=out)),
        ("--out or --table", dict(paths=(str(table),))),
        ("a row is not made of numbers", dict(paths=(str(table),), out=out)),
        ("has no evaluations", dict(paths=(str(tmp_path / "file"),), out=out)),
        ("is damaged", dict(paths=(str(damaged),), out=out)),
        ("is damaged", dict(paths=(str(damaged),))),
        ("rollouts.npz is damaged", dict(paths=(str(rotten),))),
        ("speed was not logged; choose", dict(paths=(str(run),), out=out, metric="speed")),
        ("must end with .png", dict(paths=(str(run),), out=str(tmp_path / "out.jpg"))),
        ("must end with .md", dict(paths=(str(run),), table=(str(tmp_path / "out.txt"),))),
        ("is read", dict(paths=(str(table),), table=(str(table),))),
        ("results of a run", dict(paths=(str(run),), table=(str(run / "eval.csv"),))),
        ("is not made of numbers", dict(paths=(str(torn),))),
        ("No published results about seconds", dict(paths=(str(run),), out=out, metric="seconds",
                                                    published=())),
        ("cannot write", dict(paths=(str(run),), out=str(tmp_path / "file" / "out.png"))),
    ]:  # fmt: skip
        stops(words, call=lambda flags=flags: main(Options(**flags)))
    assert not any(tmp_path.glob("out*")) and table.read_text().endswith("1,0,x,1\n")


def test_a_picture_is_whole_or_as_it_was(tmp_path, monkeypatch):
    """On a full disk, too: run folders draw again what is older than their tables."""
    run = run_folder(tmp_path)
    (run / "curve.png").write_bytes(b"as it was")
    before = {path.name for path in run.iterdir()}

    def fill_the_disk(figure, file, **options):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    stops("curve.png", "No space left", call=lambda: main(Options(paths=(str(run),))))
    assert (run / "curve.png").read_bytes() == b"as it was"
    assert {path.name for path in run.iterdir()} == before


def test_files_in_the_home_directory(tmp_path, monkeypatch):
    """A shell leaves --out=~/a.png as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = (str(run_folder(tmp_path)),)
    main(Options(paths=paths, out="~/a.png", table=("~/a.md",)))
    assert (tmp_path / "a.png").exists() and (tmp_path / "a.md").exists()
