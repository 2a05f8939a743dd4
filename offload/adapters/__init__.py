"""Adapters: peft's, on a streamed model.

peft  added, saved, loaded, folded into the weights
"""
