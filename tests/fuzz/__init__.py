"""Files with random damage, and the law that each obeys: it loads whole, or is refused whole."""
