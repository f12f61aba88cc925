"""One rank or many: where this process stands, the group, requests to stop, the launcher, the arithmetic."""
