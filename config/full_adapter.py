# The dense reference: x + full(h) + cheap(h), the same cheap FFNs trained for as long. Gap closed = 100%.
recipe = "full_adapter"
mode = "adapter"
learning_rate = learning_rate / 10  # nothing is missing here that cheap would have to learn fast; tuned at tiny
