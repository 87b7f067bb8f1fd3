"""Generation: pipeline sources, requests, step schedules, output checks, and image files."""
