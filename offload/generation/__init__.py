"""Text from prompts.

prompts   texts and conversations as tokens
sampling  how the next token is chosen
stop      texts that an answer ends before
text      completions, in batches, as they come
"""
