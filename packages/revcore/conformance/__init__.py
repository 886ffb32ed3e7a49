"""The same questions, asked of every scheme of ours and of other libraries."""
