"""How what a step sends, and its memory, grow with devices, layers and width."""
