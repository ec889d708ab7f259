"""When, how often and how much: targets, amounts per layer, and what is measured to choose them."""
