"""The loop that turns decisions into dispatched steps: requests, scoring, training, each with its own keeper."""
