"""Named data sets, their splits and statistics, and the behaviour without a network."""

import hashlib
import http.server
import io
import pickle
import socket
import tarfile
import threading
import time

import numpy as np
import pytest
import torch

from deit_fast.data import cifar, datasets
from deit_fast.data.datasets import load_dataset, pixel_statistics
from deit_fast.data.split import Split, stratified_split
from deit_fast.errors import DataError


def quiet(text):
    pass


# --- splits ---------------------------------------------------------------------------------------------------------


def test_stratified_split_is_a_partition_of_every_class():
    labels = torch.arange(300) % 3
    labels[:60] = 0  # classes of 140, 80, 80
    kept, held_out = stratified_split(labels, ("a", "b", "c"), 0.1, seed=3)
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(300))
    assert torch.bincount(labels[held_out]).tolist() == [14, 8, 8]
    assert torch.equal(kept, kept.sort().values)


def test_stratified_split_is_a_function_of_the_seed():
    labels = torch.arange(1000) % 10
    classes = tuple("0123456789")
    torch.manual_seed(0)
    _, a = stratified_split(labels, classes, 0.1, seed=5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    _, b = stratified_split(labels, classes, 0.1, seed=5)
    _, c = stratified_split(labels, classes, 0.1, seed=6)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())
    assert a[:6].tolist() == [1, 4, 7, 16, 27, 32]  # and the same on every machine


def test_a_class_always_keeps_and_gives_an_image():
    _, held_out = stratified_split(torch.tensor([0, 0, 1, 1]), ("a", "b"), 0.01, seed=0)
    assert len(held_out) == 2
    with pytest.raises(DataError, match="class 'b' has 1 training images.*--val-split"):
        stratified_split(torch.tensor([0, 0, 1]), ("a", "b"), 0.1, seed=0)
    with pytest.raises(DataError, match="class 'a' has 2"):
        stratified_split(torch.tensor([0, 0, 1, 1]), ("a", "b"), 0.9, seed=0)


@pytest.mark.parametrize("val_split", [-0.1, 1.0, 1.5, float("nan")])
def test_val_split_out_of_range(val_split):
    with pytest.raises(DataError, match="--val-split"):
        load_dataset("digits", val_split=val_split, log=quiet)


def test_split_refuses_other_tensors():
    images, labels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    for bad in (images[:, :1], images.float(), images[0]):
        with pytest.raises(ValueError, match="uint8"):
            Split(bad, labels)
    for bad in (labels[:3], labels.int()):
        with pytest.raises(ValueError, match="int64"):
            Split(images, bad)


def test_pixel_statistics_are_those_of_the_pixels():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] //= 3
    scaled = images.double() / 255
    mean, std = pixel_statistics(images)
    assert torch.allclose(torch.tensor(mean, dtype=torch.float64), scaled.mean((0, 2, 3)), atol=1e-12)
    assert torch.allclose(torch.tensor(std, dtype=torch.float64), scaled.std((0, 2, 3), correction=0), atol=1e-12)


# --- digits and auto ------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = load_dataset("digits", log=quiet)
    assert data.classes == tuple("0123456789") and data.flips is False
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    images = torch.cat([split.images for split in (data.train, data.val, data.test)])
    labels = torch.cat([split.labels for split in (data.train, data.val, data.test)])
    assert images.shape[1:] == (3, 32, 32) and images.max() == 255 and images.min() == 0
    small = torch.nn.functional.avg_pool2d(images[:, 0].float()[:, None], 4).flatten(1) * (16 / 255)
    source = load_digits()
    distance = torch.cdist(small, torch.from_numpy(source.data).float())
    nearest = distance.argmin(1)
    assert (torch.from_numpy(source.target)[nearest] == labels).float().mean() > 0.999
    assert len(nearest.unique()) > 1790  # each of them once


def test_the_test_split_of_digits_does_not_depend_on_the_seed():
    a, b = (load_dataset("digits", seed=seed, log=quiet) for seed in (0, 1))
    assert torch.equal(a.test.images, b.test.images)
    assert not torch.equal(a.val.images, b.val.images) and a.fingerprint != b.fingerprint
    assert a.fingerprint == load_dataset("digits", seed=0, log=quiet).fingerprint


def test_fingerprint_sees_every_part():
    train, test = (Split(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.arange(4)) for _ in range(2))
    seen = {datasets._fingerprint(tuple("abcd"), train, None, test)}
    pixel = Split(train.images.clone(), train.labels)
    pixel.images[3, 2, 1, 1] = 1
    label = Split(train.images, train.labels.flip(0))
    for classes, *splits in (
        ("abce", train, None, test), ("abcd", pixel, None, test), ("abcd", label, None, test),
        ("abcd", train, None, pixel), ("abcd", train, train, test), ("abcd", train, test.subset(torch.arange(0)), test),
    ):  # fmt: skip
        seen.add(datasets._fingerprint(tuple(classes), *splits))
    assert len(seen) == 7


def test_other_input_sizes_are_scaled():
    data = load_dataset("digits", input_size=48, log=quiet)
    assert data.train.images.shape[-2:] == (48, 48)
    reference = load_dataset("digits", log=quiet).train.images[:8].float()
    shrunk = torch.nn.functional.interpolate(data.train.images[:8].float(), size=(32, 32), mode="area")
    assert (shrunk - reference).abs().mean() < 6


def test_a_size_that_cannot_fit_is_refused():
    with pytest.raises(DataError, match="GiB.*--input-size.*32 pixels"):
        load_dataset("digits", input_size=1_000_000, log=quiet)


def test_unknown_data_set():
    with pytest.raises(DataError, match="'imagnet'.*auto, cifar10"):
        load_dataset("imagnet", log=quiet)


# --- CIFAR ----------------------------------------------------------------------------------------------------------


def cifar_batches(kind, per_batch=20):
    """File name -> content of a data set in CIFAR-10's own format, smaller."""
    rng = np.random.default_rng(0)
    files = {}
    for name, _ in (*kind.train_list, *kind.test_list):
        data = rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        files[name] = pickle.dumps({"data": data, "labels": [i % 10 for i in range(per_batch)]})
    files[kind.meta["filename"]] = pickle.dumps({kind.meta["key"]: [f"class{i}" for i in range(10)]})
    return files


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def small_cifar(monkeypatch):
    """torchvision's CIFAR10 with the checksums of a small set; returns (files, archive)."""
    from torchvision.datasets import CIFAR10 as kind

    files = cifar_batches(kind)
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(kind, part, [[name, md5(files[name])] for name, _ in getattr(kind, part)])
    meta = files[kind.meta["filename"]]
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(kind, "tgz_md5", md5(archive.getvalue()))
    monkeypatch.setattr(kind, "url", "http://127.0.0.1:9/closed.tar.gz")
    return kind, files, archive.getvalue()


def serve(content, monkeypatch, kind, short=0):
    """A local server that offers `content` as kind's archive and breaks off `short` bytes before its end."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(content[: len(content) - short])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{server.server_port}/{kind.filename}")
    return server


def test_cifar_is_downloaded_once_and_read_as_it_is(small_cifar, tmp_path, monkeypatch):
    kind, files, archive = small_cifar
    server = serve(archive, monkeypatch, kind)
    data = load_dataset("auto", tmp_path / "new", val_split=0, log=quiet)
    server.shutdown()
    server.server_close()
    assert data.name == "cifar10" and data.flips and data.notes == ()
    assert data.mean == (0.4914, 0.4822, 0.4465) and data.std == (0.2470, 0.2435, 0.2616)
    stored = pickle.loads(files["data_batch_1"])["data"].reshape(-1, 3, 32, 32)
    assert np.array_equal(data.train.images[:20].numpy(), stored) and len(data.train) == 100 and len(data.test) == 20
    assert data.classes[3] == "class3" and data.train.labels[:3].tolist() == [0, 1, 2]
    monkeypatch.setattr(cifar, "unreachable", lambda *a: pytest.fail("asked the network for a set that is there"))
    for path in (tmp_path / "new", tmp_path / "new" / kind.base_folder):
        assert load_dataset("cifar10", path, val_split=0, log=quiet).fingerprint == data.fingerprint


def test_an_archive_put_there_by_hand_needs_no_network(small_cifar, tmp_path):
    kind, _, archive = small_cifar
    (tmp_path / kind.filename).write_bytes(archive)
    assert len(load_dataset("cifar10", tmp_path, download=False, log=quiet).test) == 20


def test_damaged_cifar_is_said_and_mended(small_cifar, tmp_path, monkeypatch):
    kind, files, archive = small_cifar
    (tmp_path / kind.base_folder).mkdir()
    for name, content in files.items():
        (tmp_path / kind.base_folder / name).write_bytes(content)
    assert load_dataset("cifar10", tmp_path, download=False, log=quiet).name == "cifar10"
    (tmp_path / kind.base_folder / "data_batch_2").write_bytes(b"x")
    with pytest.raises(DataError, match="damaged.*--no-download"):
        load_dataset("cifar10", tmp_path, download=False, log=quiet)
    with pytest.raises(DataError, match="damaged.*cannot be downloaded.*refused"):
        load_dataset("cifar10", tmp_path, log=quiet)
    server = serve(archive, monkeypatch, kind)
    assert len(load_dataset("cifar10", tmp_path, log=quiet).test) == 20
    server.shutdown()
    server.server_close()


def test_a_download_that_breaks_off_is_an_error(small_cifar, tmp_path, monkeypatch):
    kind, _, archive = small_cifar
    server = serve(archive, monkeypatch, kind, short=1000)
    with pytest.raises(DataError, match="could not be downloaded.*Try again"):
        load_dataset("cifar10", tmp_path, log=quiet)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("answers_head", [False, True])
def test_a_host_that_stays_silent_is_given_up(small_cifar, tmp_path, monkeypatch, answers_head):
    kind = small_cifar[0]
    monkeypatch.setattr(cifar, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr(cifar, "STALL_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, never answers
        monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{listener.getsockname()[1]}/{kind.filename}")
        if answers_head:
            monkeypatch.setattr(cifar, "unreachable", lambda *a: None)
        start = time.monotonic()
        with pytest.raises(DataError, match="cifar10.*(Connect|Try again).*--data-set digits"):
            load_dataset("cifar10", tmp_path, log=quiet)
        assert time.monotonic() - start < 5
    assert socket.getdefaulttimeout() is None


def test_limits_of_waiting_keep_the_promise():
    assert cifar.PROBE_SECONDS + cifar.STALL_SECONDS < 10


def test_a_name_look_up_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(1) or [])
    start = time.monotonic()
    assert "no answer within 0.1 s" in cifar.unreachable("http://example.invalid/x", 0.1)
    assert time.monotonic() - start < 0.5


def test_auto_without_network_is_digits_and_says_so(small_cifar, tmp_path):
    data = load_dataset("auto", tmp_path, log=quiet)
    assert data.name == "digits" and not data.flips
    assert "no CIFAR-10" in data.notes[0] and "refused" in data.notes[0]
    data = load_dataset("auto", tmp_path, download=False, log=quiet)
    assert data.name == "digits" and "--no-download" in data.notes[0]


def test_auto_does_not_pass_over_a_users_own_images(tmp_path):
    (tmp_path / "train").mkdir()
    for path in (tmp_path, tmp_path / "set.tar.gz"):
        with pytest.raises(DataError, match="--data-set folder"):
            load_dataset("auto", path, log=quiet)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="needs a folder"):
        load_dataset("cifar10", tmp_path / "file", log=quiet)


def test_auto_lets_no_error_of_the_settings_pass(small_cifar, tmp_path):
    kind, _, archive = small_cifar
    (tmp_path / kind.filename).write_bytes(archive)
    with pytest.raises(DataError, match="--val-split"):
        load_dataset("auto", tmp_path, val_split=0.99, log=quiet)
