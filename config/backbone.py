# The dense model that every gate and seed of a scale shares, frozen. Quick: for the quickstart. All keys of the
# optimisation stand here, so that those of the gates do not reach it.
recipe = "backbone"
mode = "full"
max_iters = backbone_iters
learning_rate = backbone_lr
muon_lr = backbone_muon_lr
batch_size = backbone_batch_size
gradient_accumulation_steps = 1
warmup_iters = 50
min_lr_ratio = 0.1
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
eval_interval = 250
