"""What each command can be asked, one file each. Nothing here imports torch: `--help` has to come at once."""
