"""Wing 1, dynamic compute: easy tokens leave early, hard ones pass all blocks."""
