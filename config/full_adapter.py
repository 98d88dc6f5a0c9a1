# The dense reference: x + full(h) + cheap(h), the same cheap FFNs trained for as long. Gap closed = 100%.
recipe = "full_adapter"
mode = "adapter"
