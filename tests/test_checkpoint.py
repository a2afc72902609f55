"""Files that survive a crash, and checkpoints that load again or say why not."""

import argparse
import errno
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from deit_fast.errors import CheckpointError
from deit_fast.training import checkpoint, files
from needs import needs_gpu


def temporaries(folder):
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def fail_with(number):
    def writer(file):
        file.write(b"half")
        raise OSError(number, os.strerror(number))

    return writer


class TestAtomicWrite:
    def test_writes_and_replaces(self, tmp_path):
        path = tmp_path / "new" / "folder" / "a.txt"
        files.atomic_write(path, lambda file: file.write(b"one"))
        files.atomic_write(path, lambda file: file.write(b"two"))
        assert path.read_bytes() == b"two"
        assert os.listdir(path.parent) == ["a.txt"]

    @pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free space"), (errno.EDQUOT, "quota")])
    def test_full_disk_keeps_the_old_file(self, tmp_path, number, remedy):
        path = tmp_path / "last.pt"
        path.write_bytes(b"old")
        with pytest.raises(CheckpointError) as caught:
            files.atomic_write(path, fail_with(number))
        assert str(path) in str(caught.value) and os.strerror(number) in str(caught.value)
        assert remedy in str(caught.value) and "unchanged" in str(caught.value)
        assert path.read_bytes() == b"old" and not temporaries(tmp_path)

    def test_error_of_the_writer_passes_and_leaves_nothing(self, tmp_path):
        def writer(file):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            files.atomic_write(tmp_path / "a", writer)
        assert os.listdir(tmp_path) == []

    def test_a_failed_sync_is_a_failure(self, tmp_path, monkeypatch):
        path = tmp_path / "last.pt"
        path.write_bytes(b"old")

        def fsync(descriptor):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(files.os, "fsync", fsync)
        with pytest.raises(CheckpointError, match="Input/output error"):
            files.atomic_write(path, lambda file: file.write(b"new"))
        assert path.read_bytes() == b"old" and not temporaries(tmp_path)

    def test_syncs_the_file_before_the_rename_and_the_folder_after(self, tmp_path, monkeypatch):
        events = []
        fsync, replace = os.fsync, os.replace

        def logged_fsync(descriptor):
            events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
            fsync(descriptor)

        def logged_replace(source, target):
            events.append("rename")
            replace(source, target)

        monkeypatch.setattr(files.os, "fsync", logged_fsync)
        monkeypatch.setattr(files.os, "replace", logged_replace)
        files.atomic_write(tmp_path / "a", lambda file: file.write(b"x"))
        assert events == ["file", "rename", "folder"]

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "run").write_text("")
        with pytest.raises(CheckpointError, match="could not write .*run/last.pt.*Nothing was written; a file has the"):
            files.atomic_write(tmp_path / "run" / "last.pt", lambda file: None)

    def test_a_folder_in_place_of_the_file(self, tmp_path):
        (tmp_path / "last.pt").mkdir()
        with pytest.raises(CheckpointError, match="could not write"):
            files.atomic_write(tmp_path / "last.pt", lambda file: None)
        assert not temporaries(tmp_path)

    def test_symbolic_link_stays(self, tmp_path):
        (tmp_path / "scratch").mkdir()
        link = tmp_path / "last.pt"
        link.symlink_to(tmp_path / "scratch" / "real.pt")
        files.atomic_write(link, lambda file: file.write(b"x"))
        assert link.is_symlink() and (tmp_path / "scratch" / "real.pt").read_bytes() == b"x"

    def test_permissions_follow_the_umask_and_the_old_file(self, tmp_path):
        old = os.umask(0o027)
        try:
            files.atomic_write(tmp_path / "new", lambda file: None)
        finally:
            os.umask(old)
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
        (tmp_path / "new").chmod(0o604)
        files.atomic_write(tmp_path / "new", lambda file: None)
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o604


FULL_DISK = """
import resource, signal, sys, torch
from deit_fast.errors import CheckpointError
from deit_fast.training import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoint.save(sys.argv[1], {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
for write in (lambda: checkpoint.save(sys.argv[1], {"step": 2, "weights": torch.zeros(1 << 18)}),
              lambda: checkpoint.save_weights(sys.argv[2], {"weights": torch.zeros(1 << 18)})):
    try:
        write()
    except CheckpointError as error:
        print(error)
"""


def test_a_real_write_error_is_told_in_the_words_of_the_system(tmp_path):
    # torch.save hides the OSError behind a RuntimeError about zip positions; the user must read "File too large".
    path, weights = tmp_path / "last.pt", tmp_path / "model.safetensors"
    root = Path(checkpoint.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(weights)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}, timeout=100,
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert len(told) == 2 and all("File too large" in line and "ulimit" in line for line in told)
    assert str(path) in told[0] and str(weights) in told[1]
    assert checkpoint.load(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def example():
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    return {
        "model_name": "vit", "num_classes": 10, "best": float("nan"), "resume": None, "model": {"w": parameter.data},
        "optimizer": optimizer.state_dict(), "history": [{"epoch": 1, "loss": 0.5}], "rng": checkpoint.rng_state(),
    }


class TestCheckpoint:
    def test_round_trip(self, tmp_path):
        state = example()
        checkpoint.save(tmp_path / "last.pt", state)
        loaded = checkpoint.load(tmp_path / "last.pt")
        assert loaded.keys() == state.keys()
        assert torch.equal(loaded["model"]["w"], state["model"]["w"])
        assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
        assert loaded["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
        assert loaded["history"] == state["history"] and loaded["best"] != loaded["best"]

    @pytest.mark.parametrize(
        ("value", "place"),
        [
            (argparse.Namespace(a=1), r"state\['x'\] is of type Namespace"),
            ([{"y": np.float64(1)}], r"state\['x'\]\[0\]\['y'\] is of type float64"),
            (Path("runs"), "PosixPath"),
            ({(1, 2): 3}, "key of type tuple"),
        ],
    )
    def test_refuses_what_would_not_load(self, tmp_path, value, place):
        with pytest.raises(TypeError, match=place):
            checkpoint.save(tmp_path / "last.pt", {"x": value})
        assert os.listdir(tmp_path) == []

    def test_reserved_keys(self, tmp_path):
        with pytest.raises(ValueError, match="format_version"):
            checkpoint.save(tmp_path / "a.pt", {"format_version": 3})

    @pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
    def test_truncated(self, tmp_path, kept):
        path = tmp_path / "last.pt"
        checkpoint.save(path, example())
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * kept)])
        with pytest.raises(CheckpointError, match=r"last\.pt is (empty|truncated).*Use another checkpoint"):
            checkpoint.load(path)

    def test_every_flipped_byte_is_refused_or_harmless(self, tmp_path):
        path = tmp_path / "last.pt"
        state = {"model": {"w": torch.arange(64.0)}, "name": "vit"}
        checkpoint.save(path, state)
        good = path.read_bytes()
        refused = 0
        members = good.index(b"PK\x01\x02")  # behind them: the archive's table of contents
        for position in range(0, members, 5):
            data = bytearray(good)
            data[position] ^= 0xFF
            path.write_bytes(data)
            try:
                loaded = checkpoint.load(path)
            except CheckpointError:
                refused += 1
            else:  # a byte of padding or of a header that nobody needs
                assert torch.equal(loaded["model"]["w"], state["model"]["w"]) and loaded["name"] == "vit"
        assert refused > members // 5 // 3

    def test_missing_and_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            checkpoint.load(tmp_path / "none.pt")
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.load(tmp_path)

    def test_foreign_files(self, tmp_path):
        text = tmp_path / "text.pt"
        text.write_text("no checkpoint" * 100)
        with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
            archive.writestr("a.txt", "hello")
        (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"format": checkpoint.FORMAT}))
        torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "namespace.pt")
        torch.save({"model": {}}, tmp_path / "plain.pt")
        torch.save(torch.zeros(3), tmp_path / "tensor.pt")
        for path in sorted(tmp_path.iterdir()):
            with pytest.raises(CheckpointError, match=path.name) as caught:
                checkpoint.load(path)
            assert len(str(caught.value)) < 500

    def test_loading_runs_no_code(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"format": checkpoint.FORMAT, "format_version": 1, "x": Evil()}, tmp_path / "evil.pt")
        for read in (checkpoint.load, checkpoint.load_weights):
            with pytest.raises(CheckpointError):
                read(tmp_path / "evil.pt")
        assert not (tmp_path / "ran").exists()

    def test_future_version(self, tmp_path):
        torch.save({"format": checkpoint.FORMAT, "format_version": 99}, tmp_path / "last.pt")
        with pytest.raises(CheckpointError, match="version 99"):
            checkpoint.load(tmp_path / "last.pt")

    def test_another_model(self):
        state = {"model_name": "vit_nano_patch4_32", "num_classes": 10}
        checkpoint.check_matches("last.pt", state, model_name="vit_nano_patch4_32", num_classes=10)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.check_matches("last.pt", state, model_name="deit_tiny_patch4_32", num_classes=10)
        assert "vit_nano_patch4_32" in str(caught.value) and "deit_tiny_patch4_32" in str(caught.value)
        assert "num_classes" not in str(caught.value)
        with pytest.raises(CheckpointError, match="does not say its tokens"):
            checkpoint.check_matches("last.pt", state, tokens="cls")


def test_rng_state_round_trip(tmp_path):
    checkpoint.save(tmp_path / "rng.pt", checkpoint.rng_state())
    first = torch.rand(5)
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "rng.pt"))
    assert torch.equal(torch.rand(5), first)


@needs_gpu
def test_rng_state_round_trip_on_cuda():
    state = checkpoint.rng_state()
    first = torch.rand(5, device="cuda")
    checkpoint.set_rng_state({name: value.cuda() for name, value in state.items()})
    assert torch.equal(torch.rand(5, device="cuda"), first)


class TestWeights:
    def test_safetensors_round_trip(self, tmp_path):
        shared = torch.arange(6.0).reshape(2, 3)
        state = {"_orig_mod.a": shared.t(), "module.b": shared, "blocks.0._orig_mod.module.c": torch.tensor(3)}
        path = tmp_path / "model.safetensors"
        checkpoint.save_weights(path, state, {"model": "vit", "num_classes": 10, "classes": ["a", "b"]})
        loaded = checkpoint.load_weights(path)
        assert loaded.keys() == {"a", "b", "blocks.0.module.c"}
        assert torch.equal(loaded["a"], shared.t()) and torch.equal(loaded["b"], shared)
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == {
                "format": "pt", "model": "vit", "num_classes": "10", "classes": '["a", "b"]',
            }

    @pytest.mark.parametrize("key", [None, "model", "state_dict"])
    def test_foreign_weights(self, tmp_path, key):
        weights = {"module.head.weight": torch.ones(2)}
        torch.save(weights if key is None else {key: weights, "epoch": 3}, tmp_path / "w.pth")
        assert list(checkpoint.load_weights(tmp_path / "w.pth")) == ["head.weight"]

    def test_weights_of_deits_own_training(self, tmp_path):
        """They lie beside an argparse.Namespace, which weights_only refuses by itself."""
        weights = {"head.weight": torch.ones(2)}
        torch.save({"model": weights, "args": argparse.Namespace(lr=5e-4, model="deit_tiny")}, tmp_path / "d.pth")
        assert list(checkpoint.load_weights(tmp_path / "d.pth")) == ["head.weight"]

    def test_own_checkpoint_as_weights(self, tmp_path):
        checkpoint.save(tmp_path / "last.pt", example())
        assert list(checkpoint.load_weights(tmp_path / "last.pt")) == ["w"]

    def test_bad_weights(self, tmp_path):
        (tmp_path / "a.safetensors").write_bytes(b"12345678901234567890")
        torch.save({"lr": 1.0}, tmp_path / "b.pt")
        torch.save({"model": {}, "path": Path("x")}, tmp_path / "c.pt")
        for name in ("a.safetensors", "b.pt", "c.pt", "missing.safetensors", "missing.pt"):
            with pytest.raises(CheckpointError, match=name):
                checkpoint.load_weights(tmp_path / name)
