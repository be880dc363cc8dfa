"""FID, KID, precision and recall: the metrics against plain formulas, and what they say of digits."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import sqrtm
from torch_fidelity import FeatureExtractorInceptionV3

from fastdiff import feature_extractors, image_sets
from fastdiff.bulk import BulkResult, generate_many
from fastdiff.bulk_config import BulkConfig
from fastdiff.cli import main
from fastdiff.data import load_dataset
from fastdiff.eval_config import EvalSamplesConfig
from fastdiff.evaluate import KID_SEED, compare_features, evaluate_samples
from fastdiff.feature_extractors import extract, load_extractor
from fastdiff.images import save_png

SKETCH = """
def pixels(images):
    return images[:, 0, ::2, ::2].flatten(1).float() / 255

def flat(images):
    return images.float()

constant = 3
"""


def normal(count, dimension, seed):
    return torch.randn(count, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cloud(count, mean, covariance, seed):
    """Points [count, D] whose sample mean and covariance are these, to rounding."""
    points = normal(count, len(mean), seed)
    points = points - points.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(points.T.cov()), points.T, upper=False).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def test_fid_of_gaussians_in_closed_form():
    mean, other = normal(1, 5, 0)[0], normal(1, 5, 1)[0]
    deviations, others = torch.arange(1.0, 6).double(), torch.linspace(2, 0.5, 5).double()
    found = compare_features(
        cloud(40, mean, torch.diag(deviations**2), 2), cloud(60, other, torch.diag(others**2), 3), kid_subsets=1
    )
    expected = ((mean - other) ** 2).sum() + ((deviations - others) ** 2).sum()
    # float64, and a square root of eigenvalues: their error of 1e-16 times their condition number, 25
    assert found.fid == pytest.approx(expected.item(), rel=1e-10)
    # covariances that do not commute: Dowson and Landau's formula with symmetric roots
    first, second = (factor @ factor.T + torch.eye(5) for factor in (normal(5, 5, 4), normal(5, 5, 5)))
    found = compare_features(cloud(40, mean, first, 6), cloud(40, mean, second, 7), kid_subsets=1)
    root = sqrtm(first.numpy())
    expected = np.trace(first.numpy() + second.numpy() - 2 * sqrtm(root @ second.numpy() @ root).real)
    assert found.fid == pytest.approx(expected, rel=1e-8)


def plain_kid(x, y):
    """Gretton et al. 2012, equation 3, with the kernel of Binkowski et al. 2018: one pair after the other."""
    m, dimension = x.shape

    def kernel(a, b):
        return (float(a @ b) / dimension + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(m) for j in range(m) if i != j)
    across = sum(kernel(a, b) for a in x for b in y)
    return within / (m * (m - 1)) - 2 * across / m**2


def test_kid_is_the_unbiased_estimator():
    x, y = normal(12, 4, 0), normal(12, 4, 1) + 0.5
    found = compare_features(x, y, kid_subsets=1)
    assert found.kid_subset_size == 12
    assert found.kid == pytest.approx(plain_kid(x.numpy(), y.numpy()), rel=1e-12)
    # two draws of one distribution: the estimates scatter around 0 and fall below it as well
    same = [compare_features(normal(12, 4, 2 + i), normal(12, 4, 50 + i), kid_subsets=1).kid for i in range(40)]
    assert min(same) < 0 < max(same)
    assert abs(np.mean(same)) < 4 * np.std(same) / 40**0.5


def test_kid_is_the_mean_over_subsets():
    x, y = normal(30, 4, 0), normal(20, 4, 1) + 0.5
    found = compare_features(x, y, kid_subsets=50, kid_subset_size=10)
    random = np.random.RandomState(KID_SEED)
    estimates = [
        plain_kid(*(points.numpy()[random.choice(len(points), 10, replace=False)] for points in (x, y)))
        for _ in range(50)
    ]
    assert found.kid == pytest.approx(np.mean(estimates), rel=1e-12)
    assert found.kid_subset_std == pytest.approx(np.std(estimates), rel=1e-10)


def test_kid_standard_error_is_what_other_draws_change():
    """The spread of KID over sets drawn anew, against the mean error that each reports."""

    def spread(shift):
        found = [
            compare_features(normal(100, 4, 2 * i), normal(120, 4, 2 * i + 1) + shift, kid_subsets=1) for i in range(60)
        ]
        reported = np.mean([one.kid_standard_error**2 for one in found]) ** 0.5
        return reported / np.std([one.kid for one in found])

    # Of sets that differ, the parts of m images vary by 1 / sqrt(m): together as much as the whole. 60 draws know their
    # spread to 9 %, four times that is allowed.
    assert spread(0.5) == pytest.approx(1, rel=0.36)
    # Of sets that do not, the parts vary by 1 / m: sqrt(10) too much.
    assert spread(0.0) == pytest.approx(10**0.5, rel=0.36)


def test_precision_and_recall_of_points_on_a_line():
    reference, samples = (
        torch.tensor([[x, 0.0] for x in line]) for line in (range(10), (0, 2, 4, 6, 100, 101, 102, 103))
    )
    # Reach to the first neighbour: 1 in the reference, so that four of eight samples lie in it; 2 in the near samples,
    # which do not reach 9.
    found = compare_features(samples, reference, neighbours=1, kid_subsets=1)
    assert (found.precision, found.recall) == (0.5, pytest.approx(0.9))
    swapped = compare_features(reference, samples, neighbours=1, kid_subsets=1)
    assert (swapped.precision, swapped.recall) == (pytest.approx(0.9), 0.5)
    # to the second neighbour the near samples reach 4 (0 and 6) and 9 is in
    assert compare_features(samples, reference, neighbours=2, kid_subsets=1).recall == 1


def test_features_that_do_not_fit():
    with pytest.raises(ValueError, match=r"with D of at least 2, got \[9, 3\] and \[9, 4\]"):
        compare_features(torch.zeros(9, 3), torch.zeros(9, 4))
    with pytest.raises(ValueError, match=r"with D of at least 2, got \[9, 1\] and \[9, 1\]"):
        compare_features(torch.zeros(9, 1), torch.zeros(9, 1))
    with pytest.raises(ValueError, match="at least 6 images for neighbours=5, got 5"):
        compare_features(torch.zeros(5, 2), torch.zeros(9, 2), neighbours=5)
    with pytest.raises(ValueError, match="at least 4 images for neighbours=1, got 3"):
        compare_features(torch.zeros(3, 2), torch.zeros(9, 2), neighbours=1)
    assert np.isfinite(compare_features(normal(4, 2, 0), normal(4, 2, 1), neighbours=1).kid_standard_error)


@pytest.fixture(scope="module")
def classifier():
    """What a small network that tells digits apart sees in them: [B, 32] of images uint8 [B, 3, 8, 8]."""
    from sklearn.neural_network import MLPClassifier

    digits = load_dataset("digits")
    network = MLPClassifier((32,), random_state=0, tol=0.01)
    network.fit(digits.images.flatten(1).numpy() / 255, digits.labels.numpy())
    weight, bias = (torch.from_numpy(array[0]) for array in (network.coefs_, network.intercepts_))
    return lambda images: F.relu(images[:, 0].flatten(1).double() / 255 @ weight + bias)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder of 200 samples of the packaged model."""
    out = tmp_path_factory.mktemp("samples") / "drawn"
    generate_many(BulkConfig(out=out, num=200, num_inference_steps=8, batch_size=100, device="cpu"))
    return out


def test_metrics_order_digits_as_they_look(classifier, drawn):
    digits = load_dataset("digits").images
    halves = digits[::2], digits[1::2]
    blurred = F.avg_pool2d(halves[1].float(), 3, stride=1, padding=1).round().to(torch.uint8)
    noise = torch.randint(0, 256, halves[1].shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    reference = extract(classifier, image_sets.of_tensor("reference", halves[0]))

    def quality(images):
        return compare_features(extract(classifier, images), reference, kid_subset_size=200)

    real, dull, random = (quality(image_sets.of_tensor("set", images)) for images in (halves[1], blurred, noise))
    model = quality(image_sets.of_path(drawn))
    assert quality(image_sets.of_path(drawn)) == model
    assert 10 * real.fid < dull.fid < random.fid / 2
    assert 10 * abs(real.kid) < dull.kid < random.kid / 2
    assert min(real.precision, real.recall) > 0.9
    assert random.precision < 0.1
    assert random.precision < dull.precision < real.precision
    # the model is far nearer to real digits than a blur of these
    assert model.fid < dull.fid / 10
    assert model.kid < dull.kid / 10
    assert model.precision > 0.9
    assert model.recall > 0.6


@pytest.fixture
def sketch(tmp_path, monkeypatch):
    """The current folder, with a module of extractors in it, and an npz file of 40 digits."""
    (tmp_path / "sketch.py").write_text(SKETCH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "sketch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    digits = load_dataset("digits", split="held_out").images[:40]
    np.savez(tmp_path / "digits.npz", digits.permute(0, 2, 3, 1).numpy())
    return tmp_path


def test_samples_drawn_and_samples_read_are_the_same(sketch, drawn):
    """A checkpoint's samples, the folder that `fastdiff generate` wrote with the same options, and its npz."""
    settings = {"reference": "digits", "extractor": "sketch:pixels", "device": "cpu"}
    read = evaluate_samples(EvalSamplesConfig(samples=drawn, **settings))
    same = evaluate_samples(
        EvalSamplesConfig(num=200, num_inference_steps=8, batch_size=100, **{**settings, "reference": None})
    )
    assert same.metrics == read.metrics
    assert same.reference == read.reference == "digits (train)"
    assert (same.num_samples, same.num_reference, same.num_features) == (200, 1618, 16)
    assert same.seeds == {"samples": 0, "kid_subsets": KID_SEED}
    assert read.seeds["samples"] is None
    pictures = np.stack([np.asarray(Image.open(path)) for path in sorted(drawn.glob("*.png"))])
    np.savez(sketch / "samples.npz", pictures[..., None])
    assert evaluate_samples(EvalSamplesConfig(samples=sketch / "samples.npz", **settings)).metrics == read.metrics


def test_command_line(sketch, drawn, capsys):
    words = ["eval", "samples", "--samples", str(drawn), "--extractor", "sketch:pixels", "--device", "cpu"]
    assert main([*words, "--reference", "digits.npz", "--kid-subsets", "9", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_samples"], report["num_reference"], report["num_features"]) == (200, 40, 16)
    assert (report["kid_subsets"], report["kid_subset_size"], report["neighbours"]) == (9, 40, 3)
    assert (report["samples"], report["reference"]) == (str(drawn), "digits.npz")
    assert (report["extractor"], report["device"]) == ("sketch:pixels", "cpu")
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["torch-fidelity"] >= "0.4"
    assert main([*words, "--reference", "digits.npz", "--kid-subsets", "9"]) == 0
    table = capsys.readouterr().out
    assert f"FID        {report['fid']:.4g}" in table
    assert f"precision  {report['precision']:.4f}" in table
    assert "note" not in table
    # digits against themselves, fewer of them than features
    few = ["eval", "samples", "--samples", "digits.npz", "--extractor", "sketch:pixels", "--device", "cpu"]
    np.savez(sketch / "few.npz", np.load("digits.npz")["arr_0"][:16])
    assert main([*few, "--reference", "few.npz"]) == 0
    assert "FID of fewer images than features is biased" in capsys.readouterr().out


def damaged(folder):
    """Sets that nothing can be measured on, and what is said of each."""
    grey, wide = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 9, dtype=torch.uint8)
    for name in ("truncated", "sizes", "deep", "text", "short", "empty"):
        (folder / name).mkdir()
        if name != "empty":
            save_png(grey, folder / name / "000000.png")
    whole = (folder / "text" / "000000.png").read_bytes()
    (folder / "truncated" / "000001.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text" / "000001.png").write_text("no picture")
    save_png(wide, folder / "sizes" / "000001.png")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(folder / "deep" / "000001.png")
    (folder / "short" / "generation.json").write_text('{"num": 5}')
    np.savez(folder / "float.npz", np.zeros((5, 8, 8, 3), dtype=np.float32))
    np.savez(folder / "nchw.npz", np.zeros((5, 3, 8, 8), dtype=np.uint8))
    np.savez(folder / "named.npz", images=np.zeros((5, 8, 8, 3), dtype=np.uint8))
    np.savez(folder / "pickled.npz", np.array([{}], dtype=object))
    np.savez(folder / "larger.npz", np.zeros((5, 16, 16, 1), dtype=np.uint8))
    (folder / "cut.npz").write_bytes((folder / "larger.npz").read_bytes()[:-40])
    return {
        "truncated": "truncated/000001.png is not a readable image",
        "text": "text/000001.png is not a readable image",
        "sizes": "sizes/000001.png is 9x8, but sizes/000000.png is 8x8: images must have one size",
        "deep": "deep/000001.png is not an image of 8 bits a channel",
        "short": "short has 1 of the 5 samples it was made for: resume their making",
        "empty": "empty has no images directly in it",
        "nowhere": "nowhere is neither a folder of images nor an npz file",
        "nowhere.npz": "nowhere.npz does not exist",
        "float.npz": "float.npz must hold arr_0 as uint8 [N, H, W, 1 or 3], got float32 [5, 8, 8, 3]",
        "nchw.npz": "nchw.npz must hold arr_0 as uint8 [N, H, W, 1 or 3], got uint8 [5, 3, 8, 8]",
        "named.npz": "named.npz must hold the images as arr_0",
        "pickled.npz": "pickled.npz is not a readable npz file",
        "cut.npz": "cut.npz is not a readable npz file",
        "larger.npz": "reference digits.npz is 8x8, but samples larger.npz are 16x16",
    }


def test_images_that_cannot_be_compared_are_named_in_one_sentence(sketch, capsys):
    words = ["eval", "samples", "--reference", "digits.npz", "--extractor", "sketch:pixels", "--device", "cpu"]
    for name, message in damaged(sketch).items():
        assert main([*words, "--samples", name]) == 2, name
        assert capsys.readouterr() == ("", f"fastdiff eval samples: error: {message}\n")


def test_options_are_checked_before_samples_are_drawn(sketch, capsys, monkeypatch):
    monkeypatch.setattr("fastdiff.evaluate.generate_many", lambda *_, **__: pytest.fail("drew samples"))
    wrong = {
        "extractor must be inception or module:function, got 'resnet'": ["--extractor", "resnet"],
        "extractor 'nothere:pixels': there is no module nothere": ["--extractor", "nothere:pixels"],
        "extractor 'sketch:colours': sketch has no colours": ["--extractor", "sketch:colours"],
        "extractor 'sketch:constant' must be a function, got int": ["--extractor", "sketch:constant"],
        "dataset must be digits, mnist, cifar10 or folder:PATH, got 'faces'": ["--reference", "faces"],
        "neighbours must be an integer of at least 1, got 0": ["--neighbours", "0"],
        "kid_subset_size must be an integer of at least 2, got 1": ["--kid-subset-size", "1"],
        "num must be an integer of at least 1, got 0": ["--num", "0"],
        "reference must be given with samples: what shall they be compared with?": ["--samples", "digits.npz"],
    }
    for message, words in wrong.items():
        assert main(["eval", "samples", "--extractor", "sketch:pixels", "--device", "cpu", *words]) in (1, 2)
        assert capsys.readouterr() == ("", f"fastdiff eval samples: error: {message}\n")


def test_interruption_and_several_processes(sketch, capsys, monkeypatch):
    words = ["eval", "samples", "--extractor", "sketch:pixels", "--device", "cpu"]
    stopped = BulkResult(drawn=0, seconds=0.0, completed=False, out=sketch)
    with monkeypatch.context() as patch:
        patch.setattr("fastdiff.evaluate.generate_many", lambda *_, **__: stopped)
        assert main(words) == 130
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2
    assert "error: eval runs in one process: let torchrun start `fastdiff generate`" in capsys.readouterr().err


def test_extractors_that_return_something_else(sketch):
    images = image_sets.of_path(sketch / "digits.npz")
    with pytest.raises(ValueError, match=r"must return \[40, D\] for 40 images, got \[40, 3, 8, 8\]"):
        extract(load_extractor("sketch:flat"), images)
    with pytest.raises(ValueError, match="must return finite features"):
        extract(lambda batch: batch.flatten(1).float() / 0, images)


def test_inception_without_weights_says_where_they_belong(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert main(["eval", "samples", "--num", "4", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"the Inception weights {tmp_path}/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth" in error
    assert "https://github.com/toshas/torch-fidelity/releases/" in error
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("text.pth", "other.pth"):
        words = ["eval", "samples", "--extractor-weights", str(tmp_path / name), "--device", "cpu"]
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error == (
            f"fastdiff eval samples: error: {tmp_path / name} does not hold the Inception weights of torch-fidelity\n"
        )


def test_inception_is_the_network_of_torch_fidelity(tmp_path, monkeypatch):
    """Random weights in the place of the real ones: the file is read, and the layer of 2,048 features is taken."""
    module = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with monkeypatch.context() as patch:
        patch.setattr(module, lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("random", ["2048"])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = feature_extractors.inception_weights()
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    images = load_dataset("digits").images[:2].expand(-1, 3, -1, -1)
    found = extract(load_extractor("inception"), image_sets.of_tensor("digits", images))
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, network(images)[0].double(), rtol=0, atol=0)
