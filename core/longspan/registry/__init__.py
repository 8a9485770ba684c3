"""Who is there, what the user wants, who is chosen and why."""
