"""What happened: plain data, and its pictures. Imports nothing above the scheduler.

report      Report
facts       tiers, links, phases
experts     what became of experts
training    what was trained
kv          the KV cache in sentences
comparison  predicted beside measured
schema      the version of the keys, older ones renamed
summary     three lines
text        a table for a terminal
html        a page: its frame, and what has no file of its own
html_time   where the time went, on the page
html_memory memory over time, on the page
html_parts  pieces that these share
live        a view while it runs
perfetto    a trace for ui.perfetto.dev
record      report and trace together
write       to a file
"""
