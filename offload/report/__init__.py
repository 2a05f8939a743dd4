"""What happened: collected, printed, saved."""
