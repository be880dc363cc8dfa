import gzip
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.data import BatchOrder, Dataset, EmptySplitError, epoch_order, load_dataset, random_flip


def write_images(folder, names, size=(6, 5), mode="RGB"):
    generator = np.random.default_rng(len(names))
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {}
    for name in names:
        channels = () if mode == "L" else (3,)
        pixels[name] = generator.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
        Image.fromarray(pixels[name]).save(folder / name)
    return pixels


def test_digits_are_split_by_index_and_scaled_to_uint8():
    from sklearn.datasets import load_digits

    train, held_out, source = load_dataset("digits"), load_dataset("digits", split="held_out"), load_digits()
    assert (len(train), len(held_out)) == (1618, 179)
    assert train.image_shape == (1, 8, 8)
    assert train.num_classes == 10
    # Index 19 is the second held-out image, index 10 the tenth of the training set's.
    np.testing.assert_array_equal(held_out.images[1, 0].numpy(), np.round(source.images[19] * 255 / 16))
    np.testing.assert_array_equal(train.images[9, 0].numpy(), np.round(source.images[10] * 255 / 16))
    assert held_out.labels[1] == source.target[19]
    assert train.images.max() == 255


def test_mnist_files_are_read_through_torchvision(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        # The idx format: a magic number (uint8 data, number of axes), the axes, the data; all big-endian.
        files = {"images-idx3-ubyte": (0x803, images), "labels-idx1-ubyte": (0x801, labels)}
        for name, (magic, values) in files.items():
            content = np.array([magic, *values.shape], dtype=">i4").tobytes() + values.tobytes()
            (raw / f"{prefix}-{name}").write_bytes(content)
            (raw / f"{prefix}-{name}.gz").write_bytes(gzip.compress(content))
    dataset = load_dataset("mnist", root=tmp_path, download=False)
    np.testing.assert_array_equal(dataset.images[:, 0].numpy(), images)
    assert dataset.labels.tolist() == list(range(7))
    assert dataset.num_classes == 10
    resized = load_dataset("mnist", root=tmp_path, split="held_out", image_size=16, download=False)
    assert resized.images.shape == (7, 1, 16, 16)
    assert abs(resized.images.float().mean() - images.mean()) < 2


def test_cifar10_files_are_read_through_torchvision(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    images = np.random.default_rng(1).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": images.reshape(5, -1), "labels": [3, 1, 4, 1, 5]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    # Small files have other checksums than the real ones; without one, torchvision only asks whether a file exists.
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    dataset = load_dataset("cifar10", root=tmp_path, download=False)
    np.testing.assert_array_equal(dataset.images.numpy(), images)
    assert dataset.labels.tolist() == [3, 1, 4, 1, 5]
    assert dataset.class_names[2] == "class 2"


def test_absent_torchvision_data_is_one_sentence(tmp_path):
    with pytest.raises(RuntimeError, match="cifar10 could not be read from or downloaded to"):
        load_dataset("cifar10", root=tmp_path, download=False)


@pytest.mark.parametrize(("spec", "module"), [("digits", "sklearn.datasets"), ("mnist", "torchvision")])
def test_missing_dependency_names_the_extra(spec, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install fastdiff\[data\]"):
        load_dataset(spec)


def test_folder_is_read_in_sorted_order_with_every_tenth_image_held_out(tmp_path):
    names = [f"{index:02d}.png" for index in range(21)]
    pixels = write_images(tmp_path, names[::-1])
    train = load_dataset(f"folder:{tmp_path}")
    held_out = load_dataset(f"folder:{tmp_path}", split="held_out")
    assert train.labels is None
    kept = [name for name in names if name not in ("09.png", "19.png")]
    np.testing.assert_array_equal(train.images.permute(0, 2, 3, 1).numpy(), np.stack([pixels[name] for name in kept]))
    np.testing.assert_array_equal(held_out.images[1].permute(1, 2, 0).numpy(), pixels["19.png"])


def test_sub_folders_are_classes_and_grey_images_have_one_channel(tmp_path):
    write_images(tmp_path / "b", ["1.png"], size=(9, 4), mode="L")
    write_images(tmp_path / "a" / "deeper", ["1.png", "2.png"], size=(4, 4), mode="L")
    dataset = load_dataset(f"folder:{tmp_path}", image_size=4)
    assert dataset.images.shape == (3, 1, 4, 4)
    assert dataset.labels.tolist() == [0, 0, 1]
    assert dataset.class_names == ("a", "b")


def test_photographs_stand_upright_and_16_bit_images_keep_their_range(tmp_path):
    photo, deep = tmp_path / "photo", tmp_path / "deep"
    write_images(photo, ["a.png"])
    write_images(deep, ["a.png"])
    turned = Image.new("RGB", (6, 5))
    turned.getexif()[0x0112] = 6  # orientation: turn by a quarter
    turned.save(photo / "a.png", exif=turned.getexif())
    values = np.arange(30, dtype=np.uint16).reshape(5, 6) * 2000
    Image.fromarray(values).save(deep / "a.png")
    assert load_dataset(f"folder:{photo}").image_shape == (3, 6, 5)
    assert np.array_equal(load_dataset(f"folder:{deep}").images[0, 0].numpy(), values // 256)


def test_unreadable_image_is_named(tmp_path):
    write_images(tmp_path, ["a.png", "b.png"], size=(40, 40))
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"b\.png is not a readable image"):
        load_dataset(f"folder:{tmp_path}")


def test_folder_that_cannot_be_a_dataset(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load_dataset(f"folder:{tmp_path / 'absent'}")
    with pytest.raises(EmptySplitError, match="no images in its train split"):
        load_dataset(f"folder:{tmp_path}")
    write_images(tmp_path, ["a.png"], size=(4, 4))
    with pytest.raises(EmptySplitError, match="no images in its held_out split"):
        load_dataset(f"folder:{tmp_path}", split="held_out")
    write_images(tmp_path, ["b.png"], size=(5, 4))
    with pytest.raises(ValueError, match=r"need an image_size: .*b\.png is 5x4"):
        load_dataset(f"folder:{tmp_path}")
    write_images(tmp_path / "class", ["c.png"], size=(4, 4))
    with pytest.raises(ValueError, match=r"a\.png lies beside the class folders"):
        load_dataset(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": "imagenet"}, "dataset must be digits, mnist, cifar10 or folder:PATH, got 'imagenet'"),
        ({"spec": "digits", "split": "test"}, "split must be one of train, held_out, got 'test'"),
        ({"spec": "digits", "image_size": 0}, "image_size must be at least 1, got 0"),
    ],
)
def test_bad_dataset_options(options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(**options)


def test_dataset_refuses_other_than_uint8_images():
    with pytest.raises(ValueError, match=r"images must be a non-empty uint8 tensor \[N, C, H, W\], got torch.float32"):
        Dataset(name="x", images=torch.zeros(2, 3, 4, 4))


def test_batch_is_channels_last():
    images = torch.randint(0, 256, (11, 3, 5, 7), dtype=torch.uint8)
    dataset = Dataset(name="x", images=images, labels=torch.arange(11), class_names=("a",) * 11)
    chosen, labels = dataset.batch(torch.tensor([10, 0, 10]))
    assert torch.equal(chosen, images[[10, 0, 10]])
    assert labels.tolist() == [10, 0, 10]
    assert chosen.is_contiguous(memory_format=torch.channels_last)


def test_each_epoch_is_another_permutation():
    orders = [epoch_order(5, epoch, 101) for epoch in range(3)] + [epoch_order(6, 0, 101)]
    assert all(torch.equal(order.sort().values, torch.arange(101)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(orders[0], epoch_order(5, 0, 101))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 19])
def test_batch_order_visits_every_sample_once_an_epoch(batch_size):
    length, steps = 7, 21
    order = BatchOrder(3, length, batch_size)
    batches = [order.batch(step) for step in range(steps)]
    indices, epochs = (torch.cat(parts) for parts in zip(*batches))
    assert all(len(part) == batch_size for part, _ in batches)
    for epoch in range(steps * batch_size // length):
        assert torch.equal(indices[epochs == epoch], epoch_order(3, epoch, length))
    # Any step by itself, in any order: what a resumed run asks for.
    for step in (20, 3, 0):
        fresh_indices, fresh_epochs = BatchOrder(3, length, batch_size).batch(step)
        assert torch.equal(fresh_indices, batches[step][0])
        assert torch.equal(fresh_epochs, batches[step][1])


def test_random_flip_mirrors_half_of_the_images_by_sample_and_epoch():
    images = torch.randint(0, 256, (400, 1, 2, 3), dtype=torch.uint8)
    options = {"seed": 1, "epochs": torch.zeros(400, dtype=torch.int64)}
    flipped = random_flip(images, sample_indices=torch.arange(400), **options)
    mirrored = (flipped == images.flip(-1)).all(dim=(1, 2, 3)) & (flipped != images).any(dim=3).any(dim=2).any(dim=1)
    # Binomial(400, 1/2) has standard deviation 10; an image equal to its mirror (1 in 65,536) does not matter.
    assert 150 < int(mirrored.sum()) < 250
    assert ((flipped == images).all(dim=(1, 2, 3)) | mirrored).all()
    part = random_flip(images[300:], sample_indices=torch.arange(300, 400), seed=1, epochs=options["epochs"][300:])
    assert torch.equal(part, flipped[300:])
    again = random_flip(images, sample_indices=torch.arange(400), seed=1, epochs=options["epochs"] + 1)
    assert not torch.equal(again, flipped)
