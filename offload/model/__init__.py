"""From a checkpoint to parameters, and what a model is made of.

from_pretrained    its keywords
checkpoint_folder  found, or fetched from the hub
loading            a checkpoint looked at, then loaded
quantised          weights stored in fewer bytes: GGUF, FP8
conversions        what transformers' converters produce
expert_loading     experts out of checkpoints, one by one
placeholders       parameters until their values are read
blocks             finds what is streamed as one
experts            finds experts
homes              where a parameter is when it is not on the device
caches             what a transformers cache holds
micro_batch        a layer's batch in parts
pytree             tensors in nested values
text_generation    which models write text after a prompt
"""
