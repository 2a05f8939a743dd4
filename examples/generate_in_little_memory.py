"""Generate with the demo model in less memory than its weights take, and print the report."""

from transformers import AutoTokenizer

from offload import offload
from offload.model.checkpoint_folder import find_folder

folder = find_folder("demo")
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("In the beginning", return_tensors="pt")

with offload(folder, device="cpu", cpu_memory="6MiB", max_tokens=64) as session:
    output = session.model.generate(**inputs, max_new_tokens=30, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(session.report())
