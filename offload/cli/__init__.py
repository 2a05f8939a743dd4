"""The commands, one file each; what they can be asked is in `arguments`, which imports nothing heavy.

main         runs a command, and says how it ended
parser       the command line, read by typer
option       options as fields of dataclasses
options      those that several commands share
arguments    what each command can be asked
generate     `offload generate`
finetune     `offload finetune`
plan         `offload plan`
probe        `offload probe`
report       `offload report`
experts      `offload experts`
merge        `offload merge`
synth        `offload synth`
terminal     tables, bars, messages
termination  SIGTERM
"""
