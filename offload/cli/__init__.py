"""The commands, one file each.

main            the parser
generate        `offload generate`
finetune        `offload finetune`
plan            `offload plan`
probe           `offload probe`
report          `offload report`
experts         `offload experts`
merge           `offload merge`
synth           `offload synth`
shared_options  options that several commands share
terminal        tables, bars, messages
"""
