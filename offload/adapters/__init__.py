"""Adapters: peft's, on a streamed model.

config_types  whether a foreign config has values of the declared types
peft          added, saved, loaded, folded into the weights
"""
