"""`TopKBlocks`: how blocks are scored and chosen from what queries and keys hold."""
