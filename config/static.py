# Whole layers instead of tokens, chosen on training text at the same total budget. A learned gate has to beat this.
recipe = "static"
gate = "static"
share_step = 1.0
