# The dense model that every gate and seed of a scale shares, frozen. Quick: for the quickstart.
recipe = "backbone"
mode = "full"
max_iters = backbone_iters
learning_rate = backbone_lr
muon_lr = backbone_muon_lr
batch_size = backbone_batch_size
warmup_iters = 50
eval_interval = 250
