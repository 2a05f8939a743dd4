"""`offload generate`: text from prompts.

text  prompts in batches, completions
"""
