"""What a user calls on an Engine, by subject: adapters, requests, jobs."""
