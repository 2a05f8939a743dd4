"""`offload finetune`: recipe, data, loop.

recipe  what is trained, and how long
data    examples, packed and batched
loop    steps, evaluations, checkpoints
"""
