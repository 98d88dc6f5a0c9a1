# The floor: every controlled layer cheap. Gap closed = 0%.
recipe = "cheap_only"
mode = "cheap"
