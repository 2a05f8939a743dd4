"""Checkpoints whose weights are stored in fewer bytes than the model computes with.

weights     what a checkpoint holds: plain tensors, encoded ones, and the state that a model is made of
gguf        GGUF files
gguf_files  which files one consists of
gguf_metadata  a GGUF file's config and tokenizer, as a folder
fp8         8-bit floats with scales beside them
integers    integers in words: compressed-tensors, GPTQ, AWQ
bitsandbytes  four bits and eight of bitsandbytes
parts       tensors beside one another that make one weight
methods     which of them reads a checkpoint
"""
