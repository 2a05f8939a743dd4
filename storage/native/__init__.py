"""Decoders of quantised weights in C++, which somebody had built: the bits of those in torch, several times as fast.

library       builds it, finds it
decoders      calls it
decoders.cpp  what is compiled
"""
