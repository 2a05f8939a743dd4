"""Backward through streamed blocks.

recompute           a layer computed again
saved_tensors       a layer that is not: what autograd saved of it
module_wrapper      onloads a unit whose backward is to come
activation_offload  layer inputs in CPU memory; what all such stores share
nvme_activations    layer inputs on NVMe
gradients           gradients in CPU memory
gradient_transfer   gradients on their way there, added up behind backward
chunked_loss        the loss some tokens at a time
"""
