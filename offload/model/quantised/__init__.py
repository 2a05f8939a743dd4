"""Checkpoints whose weights are stored in fewer bytes than the model computes with.

weights     what a checkpoint holds: plain tensors, encoded ones, and the state that a model is made of
gguf        GGUF files
fp8         8-bit floats with scales beside them
"""
