"""`parallel-tune bench`: the strategies side by side on the user's own machine and work."""
