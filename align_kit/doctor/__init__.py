"""`align-kit doctor`: is this machine fit to train on, and what to do where it is not."""
