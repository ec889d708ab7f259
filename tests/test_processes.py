"""The processes in which calls of several ranks are tested: what fails there is told here, and does not stay."""

import os
import time
from pathlib import Path

import pytest
from processes import Processes


@pytest.fixture
def group():
    made = Processes()
    yield made
    made.stop()


def note(rank, folder, fail=None):
    Path(folder, f"{rank} {os.getpid()}").touch()
    if rank == fail:
        raise KeyError("planted")


def die(rank, which):
    if rank == which:
        os._exit(3)
    time.sleep(60)  # as one that waits for the other


def test_all_ranks_are_called_in_processes_that_stay(group, tmp_path):
    for nprocs in (2, 3, 2):
        group.spawn(note, (tmp_path,), nprocs)
    noted = sorted(path.name.split() for path in tmp_path.iterdir())
    assert [rank for rank, _ in noted] == ["0", "1", "2"]  # a process that had started anew would have another id
    assert len({pid for _, pid in noted} | {str(os.getpid())}) == 4


@pytest.mark.parametrize(
    ("function", "args", "words"),
    [(note, (".", 1), r"^rank 1 of 2: (.|\n)*note\n(.|\n)*KeyError: 'planted'"), (die, (0,), "rank 0 of 2: .*died")],
)
def test_what_fails_is_told_and_the_next_call_has_other_processes(group, tmp_path, monkeypatch, function, args, words):
    monkeypatch.chdir(tmp_path)
    group.spawn(note, (tmp_path,), 2)
    with pytest.raises(AssertionError, match=words):
        group.spawn(function, args, 2)
    before = {path.name for path in tmp_path.iterdir()}
    group.spawn(note, (tmp_path,), 2)
    assert len({path.name for path in tmp_path.iterdir()} - before) == 2
