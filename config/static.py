# Whole layers instead of tokens, chosen on training text, at the same total budget: what a gate has to beat.
recipe = "static"
gate = "static"
