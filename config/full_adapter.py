# The dense reference: x + full(h) + cheap(h), the same cheap FFNs trained for as long. Gap closed = 100%.
recipe = "full_adapter"
mode = "adapter"
learning_rate = learning_rate / 10  # cheap has little to learn here; tuned at tiny
