"""What a learner types: test, hint, diff, watch, progress, reset, run-mine."""
