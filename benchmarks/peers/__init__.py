"""The same adapted transformer, in other libraries."""
