"""Streaming, from memory and from files: the bits of a resident split, one choice between them, every fault named."""

import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import CONTEXT, train
from image_sets import CLASSES, encode, fails, load, make_files, write_directory, write_tar
from safetensors.torch import load_file
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from deit_fast.data import datasets, folder, memory
from deit_fast.data import loader as loader_module
from deit_fast.data.augmentation import Recipe, sample_plan
from deit_fast.data.auto_augment import Policy
from deit_fast.data.files import ImageFiles
from deit_fast.data.loader import EvalLoader, TrainLoader
from deit_fast.data.split import Split
from deit_fast.data.workers import worker_errors
from deit_fast.errors import DataError
from deit_fast.ops import augment
from needs import needs_gpu

RAND = "rand-m9-mstd0.5-inc1"
FULL = Recipe(crop_pad=4, hflip=0.5, brightness=0.3, contrast=0.3, reprob=0.5, mixup=0.8, cutmix=1.0, mixup_mode="elem")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("DEIT_FAST_CACHE", str(path))
    return path


@pytest.fixture
def root(tmp_path):
    return write_directory(tmp_path / "set", make_files(train=7, test=3))


def unequal_files():
    """Images of 24 to 56 pixels a side, upright and lying."""
    dice = np.random.default_rng(0)
    return {
        f"{split}/{name}/{i}.png": encode(dice.integers(0, 256, (24 + 8 * i, 56 - 4 * i, 3), dtype=np.uint8))
        for split in ("train", "test") for name in CLASSES for i in range(5)
    }  # fmt: skip


def train_loader(data, split=None, batch_size=4, **options):
    return TrainLoader(split or data.train, FULL, data.mean, data.std, len(data.classes), batch_size, **options)


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q, strict=True))


# --- the same bits --------------------------------------------------------------------------------------------------

OPTIONS = [{}, {"workers": 2, "drop_last": False, "smoothing": 0.1}, {"size": 20, "repeats": 2, "data_seed": 3},
           {"auto_augment": RAND, "workers": 1}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=["main", "workers", "cropped", "policy"])
def test_batches_from_files_are_those_of_a_resident_split(root, options):
    resident, files = (load(root, 0.2, data_loading=choice) for choice in ("resident", "stream"))
    assert isinstance(files.train.images, ImageFiles) and not resident.train.stream
    expected = list(train_loader(resident, **options).epoch(1))
    loader = train_loader(files, **options)
    assert same(loader.epoch(1), expected) and len(loader) == len(expected)
    for start in (1, len(loader)):
        assert same(loader.epoch(1, start), expected[start:])
    in_memory = train_loader(files, Split(resident.train.images, resident.train.labels, stream=True), **options)
    assert same(in_memory.epoch(1), expected) and same(in_memory.epoch(1, 2), expected[2:])
    for split in ("val", "test"):
        a, b = (EvalLoader(getattr(data, split), data.mean, data.std, 3, 2, workers=2) for data in (resident, files))
        assert same(a, b) and len(a) == len(b)


def test_images_of_unequal_sizes(tmp_path):
    """Each is scaled and cut to the input size, like a resident one."""
    root = write_directory(tmp_path / "set", unequal_files())
    resident, files = (load(root, 0.2, data_loading=choice) for choice in ("resident", "stream"))
    assert same(train_loader(files, workers=1).epoch(0), train_loader(resident).epoch(0))
    assert torch.equal(files.test.images[:], resident.test.images)


RESIZED = Recipe(rrc=True, scale=(0.3, 1.0), hflip=0.5, contrast=0.3, mixup=0.8)


@pytest.mark.parametrize("policy", [None, "ra"])
def test_resized_crops_of_files_that_fit_are_the_ops(root, policy):
    resident, files = (load(root, data_loading=choice) for choice in ("resident", "stream"))
    a, b = (TrainLoader(data.train, RESIZED, data.mean, data.std, 3, 4, auto_augment=policy)
            for data in (resident, files))  # fmt: skip
    assert same(a.epoch(1), b.epoch(1)) and "cropped" not in b.description


@pytest.mark.parametrize("policy, interpolation", [(None, "random"), (None, "bilinear"), ("ra", "bicubic")])
def test_resized_crops_are_taken_from_files_at_their_own_size(tmp_path, monkeypatch, policy, interpolation):
    """Box and interpolation are the plan's for an image of that size, resized by torchvision; the op does the rest."""
    monkeypatch.setattr(Policy, "__call__", lambda self, image: image)
    data = load(write_directory(tmp_path / "set", unequal_files()), data_loading="stream")
    files, options = data.train.images, {"smoothing": 0.1, "auto_augment": policy, "data_seed": 3}
    recipe = replace(RESIZED, interpolation=interpolation)
    loader = TrainLoader(data.train, recipe, data.mean, data.std, 3, 4, workers=2, **options)
    plan, boxes, modes = loader.plan(2), [], []
    for position, index in enumerate(plan.index.tolist()):
        h, w = files.original(index).shape[1:]
        own = sample_plan(recipe, plan.index[position:][:1], 3, 2, 1, 32, position, source_size=(h, w))
        boxes.append(own.resized_crop[0].tolist())
        modes.append(InterpolationMode.BICUBIC if own.bicubic[0] else InterpolationMode.BILINEAR)
    assert len(set(modes)) == (2 if interpolation == "random" else 1)
    assert len({tuple(box) for box in boxes}) == len(boxes) and max(box[0] + box[2] for box in boxes) > 32
    for step, (images, targets) in enumerate(loader.epoch(2)):
        rows = slice(4 * step, 4 * step + 4)
        cropped = torch.stack([resized_crop(files.original(i), *box, [32, 32], mode)
                               for i, box, mode in zip(plan.index[rows].tolist(), boxes[rows], modes[rows])])
        rest = replace(plan[rows], index=torch.arange(4), resized_crop=plan.resized_crop[:0])
        labels = data.train.labels[plan.index[rows]]
        expected = augment(cropped, labels, rest, data.mean, data.std, 3, smoothing=0.1)
        assert same([(images, targets)], [expected])
    assert same(loader.epoch(2, 2), list(loader.epoch(2))[2:]) and "decoded and cropped by 2" in loader.description


def test_the_index_knows_what_the_pixels_say(root):
    resident, files = (load(root, 0.2, data_loading=choice) for choice in ("resident", "stream"))
    assert files.classes == resident.classes and files.notes == resident.notes and files.name == resident.name
    for split in ("train", "val", "test"):
        a, b = getattr(files, split), getattr(resident, split)
        assert torch.equal(a.labels, b.labels) and a.images.shape == b.images.shape
        assert a.images.numel() == b.images.numel()
        assert torch.equal(a.images[torch.tensor([2, 0])], b.images[[2, 0]]) and torch.equal(a.images[1], b.images[1])
    for a, b in ((files.mean, resident.mean), (files.std, resident.std)):
        assert np.allclose(a, b, rtol=1e-13, atol=0)
    flat = ImageFiles(root, 1, {"sums": np.array([[[7] * 3, [49] * 3]]), "names": np.array([b"x"])})
    assert flat.statistics() == ((7 / 255,) * 3, (1 / 255,) * 3)  # a constant channel gets a std of one level


def test_the_fingerprint_changes_with_any_pixel(root):
    first = load(root, data_loading="stream").fingerprint
    assert first == load(root, data_loading="stream").fingerprint != load(root, 0.2, data_loading="stream").fingerprint
    (root / "test/emu/002.png").write_bytes(encode(np.zeros((32, 32, 3), np.uint8)))
    assert load(root, data_loading="stream").fingerprint != first


def test_streaming_leaves_the_global_generator_alone(root):
    data = load(root, data_loading="stream")
    state = torch.get_rng_state()
    list(train_loader(data, workers=1).epoch(0))
    assert torch.equal(state, torch.get_rng_state())


def test_kernels_never_run_in_workers(root, monkeypatch):
    pids = []
    monkeypatch.setattr(loader_module, "augment", lambda *a, **k: pids.append(os.getpid()) or augment(*a, **k))
    loader = train_loader(load(root, data_loading="stream"), workers=2)
    list(loader.epoch(0))
    assert pids == [os.getpid()] * len(loader)  # a call in a worker would be missing from this list


@needs_gpu
def test_batches_on_a_gpu_are_those_of_the_cpu(root):
    data = load(root, data_loading="stream")
    ours = train_loader(data, workers=2, device="cuda", backend="reference").epoch(0)
    for (a, _), (b, _) in zip(ours, train_loader(data, backend="reference").epoch(0), strict=True):
        assert torch.allclose(a.cpu(), b, atol=1e-5)


# --- the choice -----------------------------------------------------------------------------------------------------


def test_auto_streams_what_does_not_fit(root, tmp_path, monkeypatch):
    size = 30 * 3 * 32 * 32  # bytes of the 30 images

    def kind(path, memory_bytes, device_bytes, **options):
        for module in (datasets, folder):
            monkeypatch.setattr(module, "physical_memory", lambda: memory_bytes)
        monkeypatch.setattr(datasets, "room", lambda device: device_bytes)
        images = load(path, **options).train
        return "files" if isinstance(images.images, ImageFiles) else "memory" if images.stream else "device"

    assert kind(root, 2 * size, size) == "device"
    assert kind(root, 2 * size, size - 1) == "memory"
    assert kind(root, 2 * size - 1, size) == "files"
    assert kind(root, 2 * size, size - 1, data_loading="resident") == "device"
    assert kind(root, 2 * size, size, data_loading="stream") == "files"
    archive, another = (write_tar(tmp_path / name, make_files()) for name in ("set.tar.gz", "other.tar"))
    assert kind(archive, 2 * size, size, data_loading="stream") == "memory"
    with pytest.raises(DataError, match="do not fit.*a directory with --data-loading stream"):
        kind(another, 50_000, size)
    with pytest.raises(DataError, match="do not fit.*Use --data-loading stream"):
        kind(root, 50_000, size, data_loading="resident", input_size=40)


def test_room_leaves_memory_for_the_rest(monkeypatch):
    monkeypatch.setattr(memory, "physical_memory", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 900))
    assert memory.room("cpu") == 500 and memory.room("cuda:1") == 75


def test_descriptions_name_the_path(root):
    files = load(root, data_loading="stream")
    assert "21 images streamed from files below" in train_loader(files).description
    assert "decoded by 2 worker processes; augmented on cpu" in train_loader(files, workers=2).description
    assert f"{RAND} in the main process" in train_loader(files, auto_augment=RAND).description
    stream = load(root, data_loading="stream", input_size=16).train
    memory = Split(stream.images[:], stream.labels, stream=True)
    text = train_loader(files, memory, workers=2).description
    assert "streamed from host memory; augmented on cpu" in text and "worker" not in text
    with pytest.raises(ValueError, match="stream=True"):
        Split(stream.images, stream.labels)
    with pytest.raises(ValueError, match="data_loading"):
        load(root, data_loading="lazy")


def test_the_command_streams_and_says_so(root):
    flags = ("--preset", "report-vit", "--data-set", "folder", "--data-path", root, "--input-size", "16",
             "--epochs", "1", "--batch-size", "4", "--device", "cpu", "--val-split", "0.2", "--hflip", "0.5",
             "--mixup", "0.8")  # fmt: skip
    weights = []
    for choice in ("resident", "stream"):
        result = train(*flags, "--data-loading", choice, "--output-dir", root.parent / choice)
        assert result.code == 0, result.output
        assert ("streamed from files below" in result.output) == (choice == "stream"), result.output
        assert "has no effect" not in result.output
        weights.append(load_file(root.parent / choice / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# --- faults ---------------------------------------------------------------------------------------------------------


def test_the_index_serves_until_the_source_changes(root, cache, monkeypatch):
    calls = []
    scan = folder.scan_folder
    monkeypatch.setattr(folder, "scan_folder", lambda *a: calls.append(a) or scan(*a))
    first = load(root, data_loading="stream")
    assert load(root, data_loading="stream").fingerprint == first.fingerprint and len(calls) == 1
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    messages = []
    assert load(root, data_loading="stream", log=messages.append).fingerprint == first.fingerprint
    assert len(calls) == 2 and any("damaged" in text for text in messages)
    (root / "train/cat/000.png").unlink()
    assert len(load(root, data_loading="stream").train) == 20 and len(calls) == 3


def test_bad_images_are_named_or_skipped_before_training_begins(tmp_path):
    files = make_files()
    files["train/cat/001.png"] = files["train/cat/001.png"][:700]
    files["test/emu/000.png"] = b"not an image"
    root = write_directory(tmp_path / "set", files)
    fails(root, "2 of 18 images", "train/cat/001.png", "test/emu/000.png", "--skip-bad-images", data_loading="stream")
    for _ in range(2):  # scanned, then from the cache
        data = load(root, data_loading="stream", skip_bad_images=True)
        assert (len(data.train), len(data.test)) == (11, 5) and any("2 images" in note for note in data.notes)
    assert len(list(train_loader(data, drop_last=False).epoch(0))) == 3
    fails(tmp_path / "gone", "no such file", data_loading="stream")
    (root / "test/dog").rename(root / "dog")
    fails(root, "different classes", "only in train: dog", data_loading="stream")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content, words", [(None, "read any more .No such"), (b"x", "decoded any more .not an image")])
def test_a_file_that_goes_bad_during_the_run_is_named(root, workers, content, words):
    data = load(root, data_loading="stream")
    loader = train_loader(data, workers=workers, auto_augment=RAND if workers else None)
    path = root / "train/dog/003.png"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=f"train/dog/003.png: cannot be {words}") as error:
        list(loader.epoch(0))
    assert "\n" not in str(error.value)


def test_a_killed_worker_is_named(root):
    loader = train_loader(load(root, data_loading="stream"), batch_size=1, workers=1)
    others = set(multiprocessing.active_children())
    with pytest.raises(DataError, match="has died .*--workers"), worker_errors():
        for _ in loader.epoch(0):
            for worker in set(multiprocessing.active_children()) - others:
                os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="other"), worker_errors():
        raise RuntimeError("other")


def _end_with_workers_running():
    global kept  # as the traceback of a crash keeps it
    split = Split(torch.zeros(64, 3, 8, 8, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    multiprocessing.set_start_method("fork", force=True)
    kept = TrainLoader(split, Recipe(), (0.5,) * 3, (0.5,) * 3, 2, 1, auto_augment="ra", workers=2).epoch(0)
    next(kept)


def test_a_process_that_ends_takes_its_workers_along():
    process = CONTEXT.Process(target=_end_with_workers_running)
    process.start()
    process.join(60)
    ended = process.exitcode
    process.kill()
    assert ended == 0
