"""Without Triton the package imports, and samples and trains on the references."""

import os
import subprocess
import sys

# None in sys.modules: importing it raises ModuleNotFoundError, and importlib.util.find_spec finds nothing.
HIDDEN = """
import sys
sys.modules["triton"] = None
"""

SCRIPT = """
import torch
import fastdiff
from fastdiff import NoiseSchedule, Sampler, UNet, UNetConfig, noise
from fastdiff.kernels import dispatch
from fastdiff.kernels.mse import mse
from fastdiff.kernels.q_sample import q_sample

assert not dispatch.HAS_TRITON
assert not any(name.startswith("triton.") for name in sys.modules)

schedule = NoiseSchedule.cosine(20)
config = UNetConfig(sample_size=4, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                    num_res_blocks=1, attention_resolutions=(), num_classes=3, norm_num_groups=4)
sampler = Sampler(UNet(config).eval(), schedule, solver="ddpm", num_inference_steps=3, guidance_scale=2.0)
images = sampler.sample((2, 1, 4, 4), model_kwargs={"class_labels": torch.tensor([0, 2])})
assert images.shape == (2, 1, 4, 4) and images.isfinite().all()

x, t, table = torch.rand(2, 3, 5, 7), torch.tensor([0, 19]), schedule.training_table("epsilon")
eps = noise.normal((2, 3, 5, 7), seed=5, stream="train")
x_t = q_sample(x, t, table, seed=5)
expected = table[t, 0].view(2, 1, 1, 1) * x + table[t, 1].view(2, 1, 1, 1) * eps
torch.testing.assert_close(x_t, expected)
loss, gradient = mse(eps, x, t, table, target="epsilon", seed=5)
assert loss.tolist() == [0, 0] and gradient.abs().max() == 0
"""

VERIFY = """
from fastdiff.verify import verify
report = verify(only="p_sample float32")
assert report.ok, report.describe()
assert report.notes == ["Triton is not installed: only the references ran"], report.notes
assert {check.path for check in report.checks} == {"reference, CPU"}
"""


def test_runs_on_the_references():
    script = HIDDEN + SCRIPT + VERIFY
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
