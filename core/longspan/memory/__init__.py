"""What is kept: layouts in a cache, workspace in an arena, files in folders of the user's own."""
