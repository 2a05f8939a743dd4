"""Before anything runs: what a model is, what a pass takes, which plan fits, how fast it will be.

describe     nn.Module -> ModelSpec
dry_run      a pass without values: work and memory, counted
counted_work what dry runs counted, kept
operations   the same, operation by operation
estimate     the same from sizes, where code does not run without values
fit          budgets -> a plan that fits
pass_splits  micro-batches and prompt chunks
plan_file    plans that somebody gave
predictor    plan -> seconds
compare      predicted beside measured
"""
