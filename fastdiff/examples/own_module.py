"""Any nn.Module in the engine: learn a ring in the plane from its points, then sample it with 15 evaluations."""

import torch
from torch import Tensor, nn

from fastdiff import NoiseSchedule, Sampler


class Model(nn.Module):
    """Predicts v = alpha * eps - sigma * x_0 from noisy points [B, 2] and timesteps [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] / 1000 * torch.pi
        return self.layers(torch.cat([x, angle.sin(), angle.cos()], dim=1))


torch.manual_seed(0)
schedule = NoiseSchedule.cosine()
alpha, sigma = (torch.tensor(table, dtype=torch.float32)[:, None] for table in (schedule.alpha, schedule.sigma))
model = Model()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(1500):
    angle = torch.rand(256, 1) * 2 * torch.pi
    x0, eps, t = torch.cat([angle.cos(), angle.sin()], dim=1), torch.randn(256, 2), torch.randint(1000, (256,))
    v = alpha[t] * eps - sigma[t] * x0
    loss = (model(alpha[t] * x0 + sigma[t] * eps, t) - v).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

sampler = Sampler(model, schedule, solver="dpmpp_2m", num_inference_steps=15, prediction_type="v_prediction")
points = sampler.sample((1000, 2), seed=0)
radius = points.norm(dim=1)
print(f"1000 points at radius {radius.mean():.2f} +- {radius.std():.2f} around {points.mean(0).abs().max():.2f}")
