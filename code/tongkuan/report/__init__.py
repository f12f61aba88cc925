"""Pages and plots of a result."""
