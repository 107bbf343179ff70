"""Results for people: live while a probe runs, and as tables."""
