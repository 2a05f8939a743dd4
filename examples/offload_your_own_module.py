"""Any torch module with repeated blocks can be offloaded; afterwards it is as it was."""

import tempfile

import torch

from offload import offload

layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
model = torch.nn.TransformerEncoder(layer, 8, enable_nested_tensor=False).eval()
inputs = torch.randn(1, 16, 256)

with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    plain = model(inputs)
    # Its weights are in memory only, so what does not fit is written to `disk_dir` first.
    with offload(model, device="cpu", cpu_memory="12MiB", disk_dir=folder) as session:
        offloaded = model(inputs)
        print(session.report())
    print("identical:", torch.equal(plain, offloaded), "and afterwards:", torch.equal(plain, model(inputs)))
