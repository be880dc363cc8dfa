"""The folder kernels/ is fastdiff.kernels and must not pass for the unrelated package of its name."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_in_root(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_under_its_own_name_the_folder_is_empty():
    result = run_in_root("import kernels; print(getattr(kernels, '__version__', 'N/A')); import kernels.philox")
    assert result.stdout.strip() == "N/A"
    assert "ModuleNotFoundError" in result.stderr


def test_names_looked_up_there_say_where_they_live():
    result = run_in_root("import kernels; kernels.q_sample")
    assert "fastdiff.kernels" in result.stderr


def test_kernels_is_a_subpackage_from_anywhere(tmp_path):
    code = "import fastdiff.kernels.dispatch as d; print(d.__file__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert Path(result.stdout.strip()).samefile(ROOT / "kernels" / "dispatch.py")
