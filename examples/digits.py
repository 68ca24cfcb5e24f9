"""A PyTorch loop of one's own, shared: an image classifier on scikit-learn's digits (needs scikit-learn).

    shoal up --nodes 1                      # has the hub; or name one that runs elsewhere in SHOAL_HUB
    shoal train examples/digits.yaml        # drives the job
    python examples/digits.py               # takes part: once for every process, on any machine

What is Shoal's is `shoal.join`, the loop's head, `member.stepped` and, for the report, `member.held_out`.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import shoal

images, labels = load_digits(return_X_y=True)  # 1,797 images of 8 x 8 pixels from 0 to 16, ten classes
images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
training, test = slice(0, 1500), slice(1500, None)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

member = shoal.join("digits", model, optimizer, samples=len(images[training]))
for batch in member:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images[training][batch]), labels[training][batch])
    loss.backward()
    optimizer.step()
    member.stepped(loss)

with torch.no_grad():
    logits = model(images[test])
member.held_out(F.cross_entropy(logits, labels[test]).item())
print(f"{member.name}: {(logits.argmax(1) == labels[test]).float().mean():.1%} of the test images are told right.")
