"""Teach the demo model a sentence with LoRA adapters, in less memory than its weights take, and let it say it."""

import warnings

from transformers import AutoTokenizer

from offload import Training, offload
from offload.finetune.data import Batches, Example
from offload.finetune.loop import train
from offload.finetune.recipe import Recipe
from offload.model.checkpoint_folder import find_folder

warnings.simplefilter("ignore")
folder = find_folder("demo")
tokenizer = AutoTokenizer.from_pretrained(folder)
sentence = "And the king of the sea said unto the whale, Sing."
ids = tuple(tokenizer(sentence)["input_ids"])
batches = Batches([Example(ids, ids, line=1)], size=1, seed=0, padding_id=0)


def says(model):
    output = model.eval().generate(
        **tokenizer("And the king", return_tensors="pt"), max_new_tokens=len(ids) - 3, do_sample=False
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


with offload(folder, device="cpu", cpu_memory="10MiB", max_tokens=64, training=Training()) as session:
    print(f"before: {says(session.model)}")
    recipe = Recipe(rank=8, learning_rate=5e-3, epochs=12)
    adapted = recipe.adapted(session.model)
    train(session, adapted, batches, recipe, lambda step: print(f"step {step.number}: loss {step.loss:.3f}"))
    print(f"after: {says(adapted)}")
    print(session.report())
