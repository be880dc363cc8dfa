"""The examples run as a user runs them, are short, and do what they say."""

import pkgutil
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastdiff.examples

FOLDER = Path(fastdiff.examples.__file__).parent
NAMES = [module.name for module in pkgutil.iter_modules([str(FOLDER)])]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    def run_example(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_module(f"fastdiff.examples.{name}", run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_all_are_tried_here():
    # test_ray_serve.py tries the last one
    assert sorted(NAMES) == [
        "diffusers_pipeline",
        "guided_diffusion_style",
        "k_diffusion_style",
        "own_module",
        "ray_serve",
    ]


@pytest.mark.parametrize("name", sorted({*NAMES} - {"ray_serve"}))
def test_an_example_has_fewer_than_40_lines(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 40


def test_own_module(run):
    radius, spread, offset = (float(word) for word in run("own_module").split() if word[0].isdigit() and "." in word)
    # the ring has radius 1; a model of 1500 small steps draws it a few percent wide
    assert abs(radius - 1) < 0.05
    assert spread < 0.2
    assert offset < 0.2


def test_diffusers_pipeline(run):
    pytest.importorskip("diffusers")
    name, _, rest = run("diffusers_pipeline").partition(": largest difference ")
    assert name == "FastDDIMScheduler"
    assert float(rest.split()[0]) < 1


@pytest.mark.parametrize("name", ["guided_diffusion_style", "k_diffusion_style"])
def test_digits(run, tmp_path, name):
    datasets = pytest.importorskip("sklearn.datasets")
    assert run(name, "picture.png") == "wrote picture.png\n"
    picture = np.asarray(Image.open(tmp_path / "picture.png"))[::8, ::8]
    digits = [picture[1:9, 1 + 9 * i : 9 + 9 * i].astype(float) for i in range(10)]
    real = datasets.load_digits()
    means = [real.images[real.target == label].mean(axis=0) / 16 * 255 for label in range(10)]
    nearest = [int(np.argmin([np.square(digit - mean).sum() for mean in means])) for digit in digits]
    # the nearest mean knows 90 % of the real digits
    assert sum(label == guess for label, guess in enumerate(nearest)) >= 8
