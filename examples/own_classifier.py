"""Any PyTorch classifier and a DataLoader: what single bit flips in each of its layers do to its predictions."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from textguard.assessment import assess

torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels / 16).float().reshape(-1, 1, 8, 8), torch.tensor(digits)
model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()

loader = DataLoader(TensorDataset(images, labels), batch_size=256)
found = assess(model.eval(), loader, plan="guided", injections_per_layer=1024, seed=0)
shown = found.table[["layer", "sdc", "sdc_low", "sdc_high", "delta_loss", "delta_loss_low", "delta_loss_high"]]
print(shown.round(4).to_string(index=False))
