# GPT-2 (124M) as the frozen backbone: a name on the hub, or hf:FOLDER. Its shape comes with it.
scale = "gpt2"
dataset = "fineweb-edu"
backbone = "hf:gpt2"
block_size = 1024
controlled = []
cheap_rank = 192
g1_hidden = 52
latent = 32
max_iters = 2_000
warmup_iters = 100
batch_size = 16
learning_rate = 6e-3
gate_lr = 1e-3
eval_interval = 100
eval_iters = 16
