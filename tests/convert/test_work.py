import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from kit.convert.errors import ExitCode, KitError
from kit.convert.work import WorkFolder, disk_errors, put_in_place, restore_old


def test_committed_steps_survive_and_are_found_on_resume(tmp_path):
    work = WorkFolder(tmp_path / "out", {"model": "a"}, resume=False, overwrite=False)
    work.commit("step", {"x": torch.arange(3)}, {"loss": 0.5})
    again = WorkFolder(tmp_path / "out", {"model": "a"}, resume=True, overwrite=False)
    assert again.metrics("step") == {"loss": 0.5}
    assert torch.equal(load_file(again.tensors("step"))["x"], torch.arange(3))
    assert again.metrics("other") is None


def test_tensors_without_metrics_are_no_finished_step(tmp_path):
    work = WorkFolder(tmp_path / "out", {}, resume=False, overwrite=False)
    work.commit("step", {"x": torch.arange(3)}, {})
    (work.path / "step.json").unlink()
    assert work.metrics("step") is None


def test_unfinished_work_is_not_thrown_away_by_accident(tmp_path):
    WorkFolder(tmp_path / "out", {"model": "a"}, resume=False, overwrite=False)
    with pytest.raises(KitError, match="unfinished conversion") as caught:
        WorkFolder(tmp_path / "out", {"model": "a"}, resume=False, overwrite=False)
    assert caught.value.exit_code == ExitCode.USAGE
    WorkFolder(tmp_path / "out", {"model": "b"}, resume=False, overwrite=True)


def test_resume_refuses_another_conversion_and_says_what_changed(tmp_path):
    WorkFolder(tmp_path / "out", {"model": "a", "dtype": "x"}, resume=False, overwrite=False)
    with pytest.raises(KitError, match="cannot resume: model changed"):
        WorkFolder(tmp_path / "out", {"model": "b", "dtype": "x"}, resume=True, overwrite=False)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_how_to_go_on(tmp_path, number):
    with pytest.raises(KitError, match="no space left") as caught, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert "--resume" in caught.value.next_step


def test_a_real_write_beyond_a_limit_is_reported_and_leaves_no_finished_step(tmp_path):
    """The kernel refuses the bytes (a file size limit in a subprocess), as it does on a full disk."""
    code = """
import resource, sys, torch
from pathlib import Path
from kit.convert.errors import KitError
from kit.convert.work import WorkFolder
work = WorkFolder(Path(sys.argv[1]) / "out", {}, resume=False, overwrite=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    work.commit("step", {"x": torch.zeros(1_000_000)}, {})
except KitError as error:
    print(error.what)
print(work.metrics("step"))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["no space left to write the result", "None"], done.stdout + done.stderr


def test_the_old_output_stays_until_the_new_one_is_there(tmp_path, monkeypatch):
    out, new = tmp_path / "out", tmp_path / "new"
    for folder, text in ((out, "old"), (new, "new")):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(text))
    real, calls = os.replace, []

    def killed(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        put_in_place(new, out)
    monkeypatch.undo()
    restore_old(out)
    assert json.loads((out / "config.json").read_text()) == "old"
    put_in_place(new, out)
    assert json.loads((out / "config.json").read_text()) == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
